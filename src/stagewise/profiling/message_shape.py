"""Messages between cells without their tensors: forms, and which storages they view.

Two cells do the same work if they are equal and receive messages of the same form; so storages are
numbered, and a message can be renumbered from one place in the chain to another.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import torch

from stagewise.batch.values import Apart, Structure, put_together, take_apart
from stagewise.engine.stage.activation_meter import StorageKey, storage_key
from stagewise.profiling.fakes import plain

Number = Callable[[StorageKey, int], int]  # the number of a storage, given its key and bytes


@dataclass(frozen=True)
class Leaf:
    """A tensor of a message: its form, and which storage it views."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool
    storage: int


@dataclass(frozen=True)
class Packed:
    """A message without tensors."""

    structure: Structure
    leaves: tuple[Leaf, ...]

    @property
    def nbytes(self) -> int:
        return sum(leaf.shape.numel() * leaf.dtype.itemsize for leaf in self.leaves)

    @property
    def form(self) -> Hashable:
        """A key that is equal for messages that look the same to their receiver."""
        structure = self.structure
        return str(structure.spec), plain(structure.constants), structure.places, self.leaves

    def renumbered(self, names: Mapping[int, int]) -> "Packed":
        """Return the message with other numbers for its storages."""
        leaves = (replace(leaf, storage=names[leaf.storage]) for leaf in self.leaves)
        return Packed(self.structure, tuple(leaves))

    def unpacked(self, bases: Mapping[int, torch.Tensor]) -> object:
        """Return the message with fake tensors that view `bases`, flat tensors of bytes."""
        tensors = [
            bases[leaf.storage]
            .view(leaf.dtype)
            .as_strided(leaf.shape, leaf.stride, leaf.offset)
            .requires_grad_(leaf.requires_grad)
            for leaf in self.leaves
        ]
        return put_together(tensors, self.structure)


def numbered(value: object, number: Number) -> dict[StorageKey, int]:
    """Return the storages in `value` and their numbers."""
    keys = {storage_key(t): t.untyped_storage().nbytes() for t in take_apart(value)[0]}
    return {key: number(key, size) for key, size in keys.items()}


def packed(apart: Apart, number: Number) -> Packed:
    """Return a value without its tensors, its storages numbered by `number`."""
    tensors, structure = apart
    return Packed(
        structure,
        tuple(
            Leaf(
                tensor.shape,
                tensor.stride(),
                int(tensor.storage_offset()),
                tensor.dtype,
                tensor.requires_grad,
                number(storage_key(tensor), tensor.untyped_storage().nbytes()),
            )
            for tensor in tensors
        ),
    )
