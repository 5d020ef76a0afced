"""Counting activation bytes: what is kept from forward to backward, on any device.

Autograd's saved tensors are counted through saved-tensor hooks for as long as autograd keeps
them, the tensors that stages hold besides by asking the stages. A storage counts once however
many tensors view it; parameters, buffers and the caller's batch do not count.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

_Key = tuple[torch.device, int]


class _Saved:
    """Stands for a tensor that autograd saved; tells the meter when autograd lets go."""

    def __init__(self, tensor: torch.Tensor, key: _Key, counts: dict[_Key, list[int]]) -> None:
        self.tensor, self._key, self._counts = tensor, key, counts
        counts.setdefault(key, [0, tensor.untyped_storage().nbytes()])[0] += 1

    def __del__(self) -> None:
        entry = self._counts[self._key]
        entry[0] -= 1
        if entry[0] == 0:
            del self._counts[self._key]


class ActivationMeter:
    """Counts live activation bytes while `counting()`."""

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        self._excluded = {_key(tensor) for tensor in excluded}
        self._saved: dict[_Key, list[int]] = {}  # storage -> [how often saved, bytes]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved for backward by graphs made inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def live_bytes(self, held: Iterable[torch.Tensor]) -> int:
        """Bytes of what autograd keeps now and of the storages behind `held`."""
        sizes = {key: entry[1] for key, entry in self._saved.items()}
        for tensor in held:
            key = _key(tensor)
            if key not in self._excluded:
                sizes[key] = tensor.untyped_storage().nbytes()
        return sum(sizes.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        key = _key(tensor)
        return tensor if key in self._excluded else _Saved(tensor, key, self._saved)


def _unpack(saved: torch.Tensor | _Saved) -> torch.Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _key(tensor: torch.Tensor) -> _Key:
    return tensor.device, tensor.untyped_storage().data_ptr()
