"""Values that cross a boundary: any pytree of tensors and constants.

A value is taken apart into its tensors and a Structure (how to put it together again, with the
constants in it), so that transports move tensors only, and the structure is sent just when it
changes.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Structure:
    """A pytree without its tensors; `constants[i]` is None where leaf i is a tensor."""

    spec: pytree.TreeSpec
    constants: tuple[object, ...]
    is_tensor: tuple[bool, ...]

    def __reduce__(self) -> tuple[object, ...]:
        # TreeSpec warns when pickled, so the tree itself travels, with marks for its tensors.
        leaves = [
            _TENSOR if is_tensor else constant
            for is_tensor, constant in zip(self.is_tensor, self.constants, strict=True)
        ]
        return _structure_of, (pytree.tree_unflatten(leaves, self.spec),)


class _Mark(enum.Enum):
    TENSOR = enum.auto()


_TENSOR = _Mark.TENSOR


def _structure_of(skeleton: object) -> Structure:
    leaves, spec = pytree.tree_flatten(skeleton)
    return Structure(
        spec,
        tuple(None if leaf is _TENSOR else leaf for leaf in leaves),
        tuple(leaf is _TENSOR for leaf in leaves),
    )


def take_apart(value: object) -> tuple[list[torch.Tensor], Structure]:
    """Split `value` into its tensors, in order, and its structure."""
    leaves, spec = pytree.tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
    constants = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return tensors, Structure(spec, constants, is_tensor)


def put_together(tensors: Sequence[torch.Tensor], structure: Structure) -> object:
    """The inverse of `take_apart`."""
    own = iter(tensors)
    leaves = [
        next(own) if is_tensor else constant
        for is_tensor, constant in zip(structure.is_tensor, structure.constants, strict=True)
    ]
    return pytree.tree_unflatten(leaves, structure.spec)


def move(value: object, device: torch.device) -> object:
    """`value` with every tensor on `device`; tensors already there are passed on as they are."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)
