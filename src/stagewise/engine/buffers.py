"""Buffers that change in forward: spectral norm's vectors, counters, moving averages.

They change once per microbatch, in microbatch order, whatever is recomputed: a recomputation
runs with the values that its forward saw, and leaves no trace. Nor does a call that fails, or
that does not train. (BatchNorm's statistics change once per step: `engine.batchnorm`.) Which
modules change their buffers is learnt from their first forward in each mode, so that constant
buffers (masks, position tables) are copied once and never again. Values are compared there, since
some kernels, and code that writes through `.data`, leave no mark in a tensor's version.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from stagewise.errors import CellError

_Buffers = dict[str, torch.Tensor | None]
Saved = dict[int, _Buffers]  # by index into the list of modules with buffers
_Snapshot = dict[int, tuple[_Buffers, _Buffers]]  # the tensors themselves, and copies


class BufferKeeper:
    """Remembers and replays the changing buffers of some modules."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        every = dict.fromkeys(module for root in modules for module in root.modules())
        self._owners = [module for module in every if module._buffers]
        self._changes: dict[tuple[int, bool], bool] = {}  # (owner, in training mode)

    @contextmanager
    def forward(self, *, remember: bool) -> Iterator[Saved]:
        """Run a forward inside; gives what `recompute` needs if `remember`, else nothing."""
        saved: Saved = {}
        # Whether every module's buffers are known to change, or not, in its present mode.
        learnt = all((i, owner.training) in self._changes for i, owner in enumerate(self._owners))
        if learnt and not remember:
            yield saved
            return
        before = [dict(owner._buffers) for owner in self._owners]
        marks = [_marks(buffers) for buffers in before]
        for index, owner in enumerate(self._owners):
            if self._changes.get((index, owner.training), True):
                saved[index] = _copies(before[index])
        modes = [owner.training for owner in self._owners]
        yield saved
        for index, (owner, mode) in enumerate(zip(self._owners, modes, strict=True)):
            marked = _marks(owner._buffers) != marks[index]
            changes = self._changes.get((index, mode))
            if changes is None:
                changes = marked or not _equal(owner._buffers, saved[index])
                self._changes[index, mode] = changes
            elif marked and not changes and remember:
                raise CellError(
                    f"{type(owner).__name__} changed a buffer that its first forward left alone "
                    f"({', '.join(owner._buffers)}); recomputation needs the old value: use "
                    "recompute='never', or write the buffer in every forward"
                )
            if not (changes and remember):
                saved.pop(index, None)

    @contextmanager
    def recompute(self, saved: Saved) -> Iterator[None]:
        """Run a recomputation inside, with the buffers of its forward; then put all back."""
        now = {index: dict(self._owners[index]._buffers) for index in saved}
        try:
            for index, buffers in saved.items():
                self._owners[index]._buffers.update(buffers)
            yield
        finally:
            for index, buffers in now.items():
                self._owners[index]._buffers.update(buffers)

    def snapshot(self) -> _Snapshot:
        """The buffers that may change, for `put_back`."""
        return {
            index: (dict(owner._buffers), _copies(owner._buffers))
            for index, owner in enumerate(self._owners)
            if self._changes.get((index, owner.training), True)
        }

    @torch.no_grad()
    def put_back(self, snapshot: _Snapshot) -> None:
        """Make all buffers again the tensors and the values that they were."""
        for index, (buffers, copies) in snapshot.items():
            for name, buffer in buffers.items():
                overwrite(buffer, copies[name])
            self._owners[index]._buffers.update(buffers)


@contextmanager
def undone(keepers: Sequence[BufferKeeper], *, always: bool) -> Iterator[None]:
    """Run a call inside; buffers are put back if it fails, or `always`."""
    snapshots = [keeper.snapshot() for keeper in keepers]
    done = False
    try:
        yield
        done = not always
    finally:
        if not done:
            for keeper, snapshot in zip(keepers, snapshots, strict=True):
                keeper.put_back(snapshot)


def overwrite(buffer: torch.Tensor | None, value: torch.Tensor | None) -> None:
    """Make `buffer` equal `value` in place; call without gradients.

    A buffer that shares memory with itself (`expand`) refuses that, but cannot have changed.
    """
    if buffer is not None and value is not None and not torch.equal(buffer, value):
        buffer.copy_(value)


def _marks(buffers: _Buffers) -> list[tuple[str, int, int]]:
    """What changes when a buffer is replaced, or written in a way that autograd sees."""
    return [(n, id(b), 0 if b is None else b._version) for n, b in buffers.items()]


def _copies(buffers: _Buffers) -> _Buffers:
    return {name: None if b is None else b.clone() for name, b in buffers.items()}


def _equal(ours: _Buffers, theirs: _Buffers) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours.values(), theirs.values(), strict=True)
    )
