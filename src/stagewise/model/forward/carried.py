"""Find state that a cell's code carries from one microbatch to another, or leaves for another cell.

Problem: a counter, hidden state or average that forward updates advances once per microbatch, but
once per step in the plain model; a mask that one cell stores in an object is the last microbatch's
by the time a cell of another stage reads it, and missing on another rank.
Idea: run two microbatches of a call again, the first with the state that the second left, the
second with the state from before the first. A cell whose output differs carries state, visible or
not; a value that changes in every run is a counter. Caches, such as a mask made once, and values
that every forward overwrites are harmless. All visible state is restored.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from stagewise.model.forward.slots import Key, Slot, Snapshot, changed, only_read
from stagewise.model.forward.viewpoint import Viewpoint
from stagewise.model.forward.visible import Sight

Forward = Callable[..., object]
Differs = Callable[[], bool]  # runs a microbatch again; whether the output differs
Restored = Callable[[], AbstractContextManager[None]]  # inside, code runs as it did
Compare = Callable[[object], Callable[[object], bool]]  # output -> whether another one differs
_NUM_RUNS = 2  # microbatches examined per call


@dataclass(frozen=True)
class WatchedCode:
    """A cell or the loss function: its index, stage, name, and the code that runs."""

    index: int
    stage: int
    name: str
    runs: object


@dataclass(frozen=True)
class _Run:
    """One forward: snapshots before and after it, and a callable to repeat it."""

    before: Snapshot
    after: Snapshot
    differs: Differs | None


@dataclass(kw_only=True)
class Carried:
    """Examines the first microbatches of one call, in all cells and the loss of a rank."""

    sights: dict[type, Sight]  # by class of the code, for its names; kept between calls
    is_first: bool  # the first call of its mode, which also searches for invisible state
    last_stage: int = -1
    found: dict[str, str] = field(default_factory=dict)  # what is wrong -> message
    _runs: dict[int, list[_Run]] = field(default_factory=dict)
    _codes: dict[int, WatchedCode] = field(default_factory=dict)
    _views: dict[int, Viewpoint] = field(default_factory=dict)

    def watched(
        self, code: WatchedCode, forward: Forward, again: Restored | None, compare: Compare
    ) -> Forward:
        """Return `forward` of `code`, wrapped to be examined; `again` allows rerunning it."""

        def watched(*given: object) -> object:
            if len(self._runs.get(code.index, ())) >= _NUM_RUNS:
                return forward(*given)
            before, taken = self._snapshot(code), _versions(given)
            output = forward(*given)
            if _versions(given) != taken:  # it changed its input in place
                return output
            differs = None if again is None else _try(forward, given, taken, again, compare(output))
            with warnings.catch_warnings(), contextlib.suppress(Exception):
                warnings.simplefilter("ignore")
                self._ran(code, _Run(before, self._snapshot(code), differs))
            return output

        return watched

    def _ran(self, code: WatchedCode, run: _Run) -> None:
        self._codes[code.index] = code
        runs = self._runs.setdefault(code.index, [])
        runs.append(run)
        if len(runs) < _NUM_RUNS:
            return
        alone = self._runs[code.index] = [replace(run, differs=None) for run in runs]  # no inputs
        if any(_large_in(own, _written([own])) for own in runs):  # could not be restored
            runs = alone
        if large := _large_in(run, _written([run])):
            self.found[f"{code.name} counts"] = _counts(code.name, _names(large, run.after))
        self.found.update([*self._kept(code, *runs), *self._left(code, runs[-1])])

    def _snapshot(self, code: WatchedCode) -> Snapshot:
        if code.index not in self._views:
            sight = self.sights.setdefault(type(code.runs), Sight(named_only=True))
            self._views[code.index] = Viewpoint(sight, code.runs)
        return self._views[code.index].take()

    def _kept(self, code: WatchedCode, first: _Run, second: _Run) -> Iterator[tuple[str, str]]:
        """Yield problems with state that the code keeps for itself."""
        own = changed(first.before, first.after) | changed(second.before, second.after)
        now, take = second.after, partial(self._snapshot, code)
        if first.differs is None or second.differs is None or not (own or self.is_first):
            return
        with now.kept(take):
            first.before.put(changed(first.before, now) - own, now)
            follows = first.differs()
            last = take()
        # Not a cache that the first forward of a form fills; the rerun just now built no graph.
        again = changed(second.before, second.after) & changed(now, last)
        again &= changed(first.after, last)
        if own and not follows:
            with now.kept(take), contextlib.suppress(Exception):
                first.before.put(own, now)
                follows = second.differs()
        if follows:
            likely = again or own & changed(second.before, second.after) or own
            places = _names(likely, now, last, but=("statistic",))
            if places or not likely:
                yield f"{code.name} follows", _follows(code.name, places)
        elif places := _names(again, now, last, but=("hook", "buffer", "statistic")):
            yield f"{code.name} counts", _counts(code.name, places)

    def _left(self, code: WatchedCode, own: _Run) -> Iterator[tuple[str, str]]:
        """Yield problems with state that others leave and the code reads."""
        for index, runs in self._runs.items():
            other = self._codes[index]
            if index == code.index or (other.stage == code.stage and index < code.index):
                continue
            states = [run.after for run in runs]
            if len(runs) < _NUM_RUNS:
                states.append(runs[0].before)
            keys = own.after.slots.keys() & _written(runs)
            keys &= changed(*states[:_NUM_RUNS])
            if keys and own.differs is not None and self._reads(code, own, states, keys):
                places = _names(keys, own.after)
                yield (
                    f"{other.name} leaves {places}",
                    _leaves(other.name, places, code.name, sure=True),
                )

    def _reads(
        self, code: WatchedCode, own: _Run, states: Iterable[Snapshot], keys: Set[Key]
    ) -> bool:
        assert own.differs is not None
        for state in states:
            with own.after.kept(partial(self._snapshot, code)):
                state.put(keys, own.after)
                try:
                    if own.differs():
                        return True
                except Exception:  # fails with another microbatch's state
                    return True
        return False

    def look_elsewhere(self, codes: Mapping[str, weakref.ref[Any]]) -> None:
        """Call at the end: find state left here that another rank's code (by name) can see."""
        with contextlib.suppress(Exception):
            self._look_elsewhere(codes)
        self._runs.clear()  # they refer to the call, which refers to this
        self._views.clear()

    def _look_elsewhere(self, codes: Mapping[str, weakref.ref[Any]]) -> None:
        left, varying = dict[Key, tuple[WatchedCode, Slot]](), set[Key]()
        for index, runs in self._runs.items():
            after = runs[-1].after
            varying |= changed(runs[0].after, after)
            for key in _written(runs) & after.slots.keys():
                if not after.slots[key].kind:
                    left[key] = self._codes[index], after.slots[key]
        for name, reference in codes.items() if left else ():
            code, sight = reference(), Sight(named_only=True)
            keys = left.keys() & (
                () if code is None else Viewpoint(sight, code).take().slots.keys()
            )
            keys = {k for k in keys if not isinstance(k[1], str) or k[1] in sight.names}
            if (constant := keys - varying) and code is not None:
                keys -= constant - only_read(sight.walk(code), constant)
            for other, slot in map(left.__getitem__, keys):
                text = _leaves(other.name, (slot.name,), f"{name} of another rank", sure=False)
                self.found.setdefault(f"{other.name} leaves {slot.name}", text)


def _versions(given: object) -> list[int]:
    return [
        leaf._version
        for leaf in pytree.tree_leaves(given)
        if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]


def _try(
    forward: Forward,
    given: tuple[object, ...],
    versions: list[int],
    again: Restored,
    differs: Callable[[object], bool],
) -> Differs:
    def run() -> bool:
        if _versions(given) != versions:  # a later cell has changed the input in place
            return False
        with again():
            return differs(forward(*given))

    return run


def _follows(name: str, places: tuple[str, ...]) -> str:
    what = (
        f"changes {', '.join(places[:3])} in forward and then returns something else for the same "
        "microbatch"
        if places
        else "returns something else when it runs again on the same microbatch, without a visible "
        "change of state (an iterator's next item, a generator that it creates itself, the time)"
    )
    return (
        f"{name} {what}: that happens once per microbatch, so results depend on their number, "
        "where the plain model does it once per step; change it outside forward, once per step, "
        "pass it in with the batch and return it, or plan with num_microbatches=1"
    )


def _counts(name: str, places: tuple[str, ...]) -> str:
    return (
        f"{name} changes {', '.join(places[:3])} in every forward, once per microbatch, where the "
        "plain model does it once per step; if anything is computed from it, as in annealing, "
        "results depend on the number of microbatches: change it outside forward, once per step, "
        "or plan with num_microbatches=1"
    )


def _leaves(name: str, places: tuple[str, ...], reader: str, *, sure: bool) -> str:
    return (
        f"{name} leaves {', '.join(places[:3])} behind in forward, and {reader} "
        f"{'reads' if sure else 'may read'} it: by then it may be another microbatch's, and it "
        "does not reach other ranks; return it with the value, or pass it as a skip (stash and pop)"
    )


def _written(runs: Iterable[_Run]) -> set[Key]:
    return set[Key]().union(*(changed(run.before, run.after) for run in runs))


def _large_in(run: _Run, keys: Iterable[Key]) -> list[Key]:
    """Those of `keys` that were tensors before and after the run, too large to be copied."""
    both = run.before.slots, run.after.slots
    return [key for key in keys if all(key in s and s[key].is_shared_tensor for s in both)]


def _names(keys: Iterable[Key], *seen: Snapshot, but: Collection[str] = ()) -> tuple[str, ...]:
    slots = (next((s.slots[key] for s in seen if key in s.slots), None) for key in keys)
    return tuple(sorted({s.name for s in slots if s is not None and s.kind not in but}))
