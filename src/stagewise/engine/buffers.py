"""Buffers that change in forward (BatchNorm's statistics, spectral norm's vectors).

They change once per microbatch, in microbatch order, whatever is recomputed: a recomputation
runs with the values that its forward saw, and leaves no trace. Which buffers change is learnt
from the forwards, so that constant ones (masks, position tables) are never copied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

_Place = tuple[nn.Module, str]
Saved = dict[int, torch.Tensor]  # by index into the list of buffers


class BufferKeeper:
    """Remembers and replays the changing buffers of some modules."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._places: list[_Place] = [
            (module, name)
            for root in modules
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._changing: set[int] = set(range(len(self._places)))  # until a forward was seen
        self._seen: set[int] = set()

    @contextmanager
    def forward(self, *, remember: bool) -> Iterator[Saved]:
        """Run a forward inside; gives what `recompute` needs if `remember`, else nothing."""
        before = self._tensors()
        versions = [buffer._version for buffer in before]
        saved = {i: before[i].clone() for i in self._changing} if remember else {}
        yield saved
        for index, now in enumerate(self._tensors()):
            if now is not before[index] or now._version != versions[index]:
                self._seen.add(index)
        self._changing = set(self._seen)
        for index in set(saved) - self._changing:
            del saved[index]

    @contextmanager
    def recompute(self, saved: Saved) -> Iterator[None]:
        """Run a recomputation inside, with the buffers of its forward; then put all back."""
        now = self._tensors()
        for index, tensor in saved.items():
            self._put(index, tensor)
        yield
        for index in saved:
            self._put(index, now[index])

    def _tensors(self) -> list[torch.Tensor]:
        return [module._buffers[name] for module, name in self._places]  # type: ignore[misc]

    def _put(self, index: int, tensor: torch.Tensor) -> None:
        module, name = self._places[index]
        module._buffers[name] = tensor
