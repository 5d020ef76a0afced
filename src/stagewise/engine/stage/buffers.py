"""Buffers that change in forward: spectral norm's vectors, counters, moving averages.

They change once per microbatch, in microbatch order. A recomputation runs with the values that its
forward saw, and leaves no trace; nor does a call that fails or does not train. (BatchNorm's
statistics change once per step: `engine.stage.batchnorm`.)

Idea: each forward gets copies, from whose final values the next one starts. So nothing changes what
a graph has saved, a cell has returned, or a recomputation needs; when the call succeeds, the last
values are written into the module's own tensors.
Which modules change their buffers is learnt from their first forward in each mode, so constant
buffers (masks, position tables) are copied only once. That forward compares values, since some
kernels, and writes through `.data`, do not bump a tensor's version.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from stagewise.batch.layouts import equal
from stagewise.errors import CellError
from stagewise.model.forward.users_code import warn_user

_Buffers = dict[str, torch.Tensor | None]
Saved = dict[int, _Buffers]  # keyed by index into the list of modules with buffers
_Marks = list[tuple[str, int, int]]
_NO_BUFFERS: AbstractContextManager[Saved] = nullcontext({})


class BufferKeeper:
    """Remembers and replays the changing buffers of some modules."""

    def __init__(self, modules: Sequence[nn.Module], *, has_values: bool = True) -> None:
        self._has_values = has_values  # fake buffers have no values to compare
        every = dict.fromkeys(module for root in modules for module in root.modules())
        self.owners = [module for module in every if module._buffers]
        self._changes: dict[tuple[int, bool], bool] = {}  # (owner, in training mode)
        # During a call: the copy in a module -> the module's own tensor.
        self._originals: dict[torch.Tensor, torch.Tensor] = {}
        self._forbidden = ""  # why no buffer may change, if so
        self._names: Mapping[nn.Module, str] = {}

    def forbid_changes(self, names: Mapping[nn.Module, str], why: str) -> None:
        """Make a forward that changes a persistent buffer raise CellError; `why` explains it.

        A buffer with persistent=False is a constant or a cache, and may be filled late.
        """
        self._names, self._forbidden = names, why

    def forward(self, *, remember: bool) -> AbstractContextManager[Saved]:
        """Run a forward inside; yields what `recompute` needs if `remember`, else nothing."""
        return self._forward(remember=remember) if self.owners else _NO_BUFFERS

    @contextmanager
    def _forward(self, *, remember: bool) -> Iterator[Saved]:
        saved: Saved = {}
        modes = [owner.training for owner in self.owners]
        changing = [i for i, mode in enumerate(modes) if self._changes.get((i, mode), True)]
        if not changing and not remember and not self._forbidden:
            yield saved
            return
        before = {index: dict(self.owners[index]._buffers) for index in changing}
        for index, copies in _copies(before).items():
            self.owners[index]._buffers.update(copies)
        marks = [_marks(owner._buffers) for owner in self.owners]
        placed = {index: dict(self.owners[index]._buffers) for index in changing}
        yield saved
        for index, (owner, mode) in enumerate(zip(self.owners, modes, strict=True)):
            if self._forbidden:
                self._check_constant(owner, marks[index], before.get(index))
            if index in changing:
                changes = self._changes.setdefault(
                    (index, mode),
                    _marks(owner._buffers) != marks[index]
                    or (self._has_values and not _equal(owner._buffers, before[index])),
                )
                if changes:
                    self._adopt(before[index], placed[index])
                    if remember:
                        saved[index] = before[index]
                else:
                    owner._buffers.update(before[index])
            elif remember and _marks(owner._buffers) != marks[index]:
                raise CellError(
                    f"{type(owner).__name__} changed a buffer that its first forward did not "
                    f"({', '.join(owner._buffers)}); recomputation needs the old value: use "
                    "recompute='never', or write the buffer in every forward"
                )

    @contextmanager
    def recompute(self, saved: Saved) -> Iterator[None]:
        """Run a recomputation inside with the buffers that its forward saw; then restore them."""
        now = {index: dict(self.owners[index]._buffers) for index in saved}
        try:
            for index, copies in _copies(saved).items():
                self.owners[index]._buffers.update(copies)
            yield
        finally:
            for index, buffers in now.items():
                self.owners[index]._buffers.update(buffers)

    def _check_constant(self, owner: nn.Module, marks: _Marks, before: _Buffers | None) -> None:
        """Raise CellError if buffers differ from `before`, or, without it, from `marks`."""
        now = owner._buffers
        changed = {name for name, _, _ in set(_marks(now)).symmetric_difference(marks)}
        if before is not None:
            changed = {n for n, b in now.items() if not _equal({n: b}, {n: before.get(n)})}
        changed -= owner._non_persistent_buffers_set
        if changed:
            raise CellError(
                f"{self._names[owner]} ({type(owner).__name__}) changed its buffer "
                f"{', '.join(sorted(changed))} in forward; {self._forbidden}"
            )

    def snapshot(self) -> tuple[Saved, list[_Marks]]:
        """Return all buffers as they are, for `put_back`."""
        return (
            {index: dict(owner._buffers) for index, owner in enumerate(self.owners)},
            [_marks(owner._buffers) for owner in self.owners],
        )

    def put_back(self, snapshot: tuple[Saved, list[_Marks]], *, warn: bool) -> None:
        """Restore the tensors of all buffers; `warn` of constant ones that were written to."""
        buffers, marks = snapshot
        self._originals.clear()
        for index, owner in enumerate(self.owners):
            owner._buffers.update(buffers[index])
            if _marks(owner._buffers) != marks[index]:
                self._changes[index, owner.training] = True
                if not warn:  # an error says more
                    continue
                warn_user(
                    f"{type(owner).__name__} changed a buffer that its first forward did not "
                    f"({', '.join(owner._buffers)}), in a call that should leave no trace; from "
                    "now on such calls restore it",
                )

    @torch.no_grad()
    def write_back(self) -> None:
        """End a call: give the modules their own tensors again, with the last values."""
        for owner in self.owners if self._originals else ():
            for name, buffer in owner._buffers.items():
                original = None if buffer is None else self._originals.get(buffer)
                if original is not None and buffer is not None:
                    overwrite(original, buffer)
                    owner._buffers[name] = original
        self._originals.clear()

    def _adopt(self, before: _Buffers, placed: _Buffers) -> None:
        """Map the copies in `placed` to the originals of `before`."""
        for name, copy in placed.items():
            old = before[name]
            if copy is not None and old is not None:
                self._originals[copy] = self._originals.pop(old, old)


@contextmanager
def undone(keepers: Sequence[BufferKeeper], *, always: bool) -> Iterator[None]:
    """Run a call inside; restore buffers if it fails, or `always`."""
    snapshots = [keeper.snapshot() for keeper in keepers]
    ended = False
    try:
        yield
        ended = True
    finally:
        for keeper, snapshot in zip(keepers, snapshots, strict=True):
            if ended and not always:
                keeper.write_back()
            else:
                keeper.put_back(snapshot, warn=ended)


@contextmanager
def values_put_back(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run anything inside; then restore every buffer's tensor and values."""
    before = [
        (owner, name, buffer, None if buffer is None else buffer.clone())
        for module in modules
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in before:
                owner._buffers[name] = buffer
                overwrite(buffer, value)


def overwrite(buffer: torch.Tensor | None, value: torch.Tensor | None) -> None:
    """Copy `value` into `buffer` if they differ; call under no_grad.

    A buffer that overlaps itself (`expand`) cannot be written, but cannot have changed either.
    """
    if buffer is not None and value is not None and not equal(buffer, value):
        buffer.copy_(value)


def _marks(buffers: _Buffers) -> _Marks:
    """Return marks that change when a buffer is replaced, or written in a way autograd sees."""
    return [(n, id(b), 0 if b is None else b._version) for n, b in buffers.items()]


def _copies(originals: Saved) -> Saved:
    """Copy all buffers, each once even if registered in several places."""
    known: dict[int, torch.Tensor] = {}

    def copy(buffer: torch.Tensor | None) -> torch.Tensor | None:
        return None if buffer is None else known.setdefault(id(buffer), buffer.clone())

    return {
        index: {name: copy(buffer) for name, buffer in buffers.items()}
        for index, buffers in originals.items()
    }


def _equal(ours: _Buffers, theirs: _Buffers) -> bool:
    return ours.keys() == theirs.keys() and all(
        a is b or (a is not None and b is not None and equal(a, b))
        for a, b in zip(ours.values(), theirs.values(), strict=True)
    )
