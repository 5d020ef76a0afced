"""Counting activation bytes: what is kept from forward to backward, on any device.

Autograd's saved tensors are counted through saved-tensor hooks for as long as autograd keeps
them, the tensors that stages hold besides by asking the stages. A storage counts once however
many tensors view it; parameters, buffers and the caller's batch do not count.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from stagewise.batch.layouts import storages

StorageKey = tuple[torch.device, int]


class Packed:
    """Stands for a tensor that autograd saved; tells the meter when autograd lets go."""

    def __init__(
        self, tensor: torch.Tensor, key: StorageKey, counts: dict[StorageKey, list[int]]
    ) -> None:
        # Detached: a node that saves its own output would else keep itself alive for ever where
        # its graph never runs backward. Autograd puts the graph back when it unpacks.
        self.tensor: torch.Tensor | None = tensor.detach()
        self._key, self._counts = key, counts
        counts.setdefault(key, [0, storage_bytes(tensor)])[0] += 1

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Forget the tensor; nothing may unpack it any more."""
        if self.tensor is None:
            return
        self.tensor = None
        entry = self._counts[self._key]
        entry[0] -= 1
        if entry[0] == 0:
            del self._counts[self._key]


class ActivationMeter:
    """Counts live activation bytes while `counting()`."""

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        # With the tensors: the key of one that is gone would be given to another.
        self._excluded = {storage_key(tensor): tensor for tensor in excluded}
        self._saved: dict[StorageKey, list[int]] = {}  # storage -> [how often saved, bytes]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved for backward by graphs made inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, unpack):
            yield

    def live_bytes(self, held: Iterable[torch.Tensor]) -> int:
        """Bytes of what autograd keeps now and of the storages behind `held`."""
        return sum(entry[1] for entry in self._saved.values()) + sum(self.unsaved(held).values())

    @property
    def saved(self) -> dict[StorageKey, int]:
        """Bytes of the storages that autograd keeps now."""
        return {key: num_bytes for key, (_, num_bytes) in self._saved.items()}

    def unsaved(self, held: Iterable[torch.Tensor]) -> dict[StorageKey, int]:
        """Bytes of the storages behind `held` that autograd does not keep, by storage."""
        return {
            storage_key(tensor): storage_bytes(tensor)
            for tensor in held
            if storage_key(tensor) not in self._excluded and storage_key(tensor) not in self._saved
        }

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Packed:
        key = storage_key(tensor)
        return tensor if key in self._excluded else Packed(tensor, key, self._saved)


def unpack(saved: torch.Tensor | Packed) -> torch.Tensor:
    """The tensor that a meter packed."""
    if not isinstance(saved, Packed):
        return saved
    assert saved.tensor is not None, "unpacked after its release"
    return saved.tensor


def storage_key(tensor: torch.Tensor) -> StorageKey:
    """What tells storages apart while they live, those without memory too (meta, fake)."""
    *_, storage = storages(tensor)
    return tensor.device, storage._cdata


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind it."""
    return sum(storage.nbytes() for storage in storages(tensor))
