"""Count activation bytes: what is kept from forward to backward, on any device.

Saved-tensor hooks count what autograd saves for as long as it keeps it; the stages are asked for
the other tensors they hold. A storage counts once, however many tensors view it; parameters,
buffers and the caller's batch do not count.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from stagewise.batch.layouts import storages

StorageKey = tuple[torch.device, int]


class SavedTensor:
    """Wraps a tensor that autograd saved, and tells the meter when autograd drops it."""

    def __init__(
        self, tensor: torch.Tensor, key: StorageKey, counts: dict[StorageKey, list[int]]
    ) -> None:
        # Detached: a node that saves its own output would otherwise keep itself alive forever if
        # its graph never runs backward. Autograd reattaches the graph when it unpacks.
        self.tensor: torch.Tensor | None = tensor.detach()
        self._key, self._counts = key, counts
        counts.setdefault(key, [0, storage_bytes(tensor)])[0] += 1

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Drop the tensor; it must not be unpacked afterwards."""
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
        # Keeps the tensors alive, since the key of a freed one may be reused.
        self._excluded = {storage_key(tensor): tensor for tensor in excluded}
        self._saved: dict[StorageKey, list[int]] = {}  # storage -> [how often saved, bytes]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what graphs created inside save for backward."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, unpack):
            yield

    def live_bytes(self, held: Iterable[torch.Tensor]) -> int:
        """Return the bytes that autograd keeps now plus those of the storages behind `held`."""
        return sum(entry[1] for entry in self._saved.values()) + sum(self.unsaved(held).values())

    @property
    def saved(self) -> dict[StorageKey, int]:
        """Bytes of the storages that autograd keeps now."""
        return {key: num_bytes for key, (_, num_bytes) in self._saved.items()}

    def unsaved(self, held: Iterable[torch.Tensor]) -> dict[StorageKey, int]:
        """Return the bytes of storages behind `held` that autograd does not keep, by storage."""
        return {
            storage_key(tensor): storage_bytes(tensor)
            for tensor in held
            if storage_key(tensor) not in self._excluded and storage_key(tensor) not in self._saved
        }

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | SavedTensor:
        key = storage_key(tensor)
        return tensor if key in self._excluded else SavedTensor(tensor, key, self._saved)


def unpack(saved: torch.Tensor | SavedTensor) -> torch.Tensor:
    """Return the tensor that a meter packed."""
    if not isinstance(saved, SavedTensor):
        return saved
    assert saved.tensor is not None, "unpacked after its release"
    return saved.tensor


def storage_key(tensor: torch.Tensor) -> StorageKey:
    """Return a key that is unique among live storages, including meta and fake ones."""
    *_, storage = storages(tensor)
    return tensor.device, storage._cdata


def storage_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the storage behind `tensor`."""
    return sum(storage.nbytes() for storage in storages(tensor))
