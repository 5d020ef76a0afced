"""Exact partition if every device holds two stages: dynamic programming over pairs of cells.

Problem: device d's load is the sum of two runs of cells: stage d with stage K + d (looped,
Narayanan et al., arXiv:2104.04473) or with stage 2K - 1 - d (a V, Qi et al., arXiv:2405.15362).
Idea: after d devices, only the progress of the first run of cells and of the second matters; the
second starts in the middle (looped; every middle is tried) or comes back from the end (V). States
no better than the incumbent are pruned, which leaves few.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stagewise.planning.partition.cut_costs import Array, Layout

Ints = NDArray[np.int64]
ScoredCuts = tuple[float, tuple[int, ...]]  # the busiest device's seconds, cuts
_PER_MOVE = 500  # cost of a numpy call, in states


class TooMuchWork(Exception):
    """The search was given up; nothing is proven."""


def has_two_per_device(layout: Layout) -> bool:
    """Whether every device holds two stages, the second ones in the same or the opposite order."""
    half, rest = divmod(layout.num_stages, 2)
    first, second = layout.placement[:half], layout.placement[half:]
    return (
        not rest
        and all(len(devices) == 1 for devices in first)
        and len(set(first)) == half
        and second in (first, first[::-1])
    )


def cut_two_per_device(layout: Layout, better_than: float, max_work: int) -> ScoredCuts | None:
    """Return the best cuts that take less than `better_than` seconds; None if there are none.

    Raises TooMuchWork after examining about `max_work` states.
    """
    half, num_cells = layout.num_stages // 2, layout.num_cells
    search = _Search(layout, better_than, max_work)
    if layout.placement[half:] == layout.placement[:half][::-1]:
        search.fill(_Fold(layout, num_cells))
    else:
        for middle in sorted(
            range(half, num_cells - half + 1), key=lambda m: abs(2 * m - num_cells)
        ):
            search.fill(_Loop(layout, middle))
    return search.best


@dataclass(frozen=True)
class _States:
    """The progress of the two runs of cells, and the busiest device's seconds so far."""

    first: Ints
    second: Ints
    seconds: Array

    def only(self, mask: NDArray[np.bool_]) -> "_States":
        return _States(self.first[mask], self.second[mask], self.seconds[mask])


@dataclass(frozen=True)
class _Loop:
    """Looped placement: the second run starts where the first one ends, in the middle."""

    layout: Layout
    middle: int
    step = 1  # of the second run

    def start(self) -> tuple[int, int]:
        return 0, self.middle

    def room(self, i: Ints, j: Ints) -> Ints:
        """Return how many more devices could get a cell of each run."""
        room: Ints = np.minimum(self.middle - i, self.layout.num_cells - j)
        return room

    def rest(self, i: Ints, j: Ints) -> Array:
        """Return the seconds of the cells that are left."""
        prefix = self.layout.prefix
        total: Array = prefix[self.middle] - prefix[i] + prefix[-1] - prefix[j]
        return total

    def ends(self, before: _States) -> Iterator[tuple[_States, Ints, Ints]]:
        """Yield the moves of the last device, which takes all remaining cells."""
        own = before.only(self.room(before.first, before.second) >= 1)
        size = len(own.first)
        yield own, np.full(size, self.middle), np.full(size, self.layout.num_cells)

    def sums(self, starts: Array, ends: Array, device: int, moved: "_Moved") -> Array:
        before, i, j = moved
        back = self.layout.num_stages // 2 + device
        first: Array = ends[device, i] - starts[device, before.first]
        second: Array = ends[back, j] - starts[back, before.second]
        return first + second

    def cuts(self, firsts: list[int], seconds: list[int]) -> tuple[int, ...]:
        return (*firsts, *seconds[1:])


class _Fold(_Loop):
    """V placement: the second run comes back from the end and meets the first."""

    step = -1

    def start(self) -> tuple[int, int]:
        return 0, self.layout.num_cells

    def room(self, i: Ints, j: Ints) -> Ints:
        room: Ints = (j - i) // 2
        return room

    def rest(self, i: Ints, j: Ints) -> Array:
        total: Array = self.layout.prefix[j] - self.layout.prefix[i]
        return total

    def ends(self, before: _States) -> Iterator[tuple[_States, Ints, Ints]]:
        for size in range(1, self.layout.num_cells):
            own = before.only(before.second - before.first > size)
            if not len(own.first):
                return
            yield own, own.first + size, own.first + size

    def sums(self, starts: Array, ends: Array, device: int, moved: "_Moved") -> Array:
        before, i, j = moved
        back = self.layout.num_stages - 1 - device
        first: Array = ends[device, i] - starts[device, before.first]
        second: Array = ends[back, before.second] - starts[back, j]
        return first + second

    def cuts(self, firsts: list[int], seconds: list[int]) -> tuple[int, ...]:
        return (*firsts, *reversed(seconds[:-1]))


_Moved = tuple[_States, Ints, Ints]  # states, and the progress of both runs after a device


class _Search:
    """The incumbent; every `fill` looks for better cuts."""

    def __init__(self, layout: Layout, better_than: float, max_work: int) -> None:
        self.best: ScoredCuts | None = None
        self._layout, self._known, self._work = layout, better_than, max_work

    def fill(self, shape: _Loop) -> None:
        """Search all cuts of `shape`."""
        limit = self._known * (1 - 1e-12)  # so that rounding does not find the incumbent again
        first, second = shape.start()
        states = _States(np.array([first]), np.array([second]), np.array([0.0]))
        history, num_cells = [states], self._layout.num_cells
        for device in range(self._layout.num_stages // 2):
            found = np.full((num_cells + 1, num_cells + 1), np.inf)
            for moved in self._moves(shape, device, states, limit):
                np.minimum.at(found, moved[1:], self._loads(shape, device, moved))
            i, j = np.nonzero(found < limit)
            if not len(i):
                return
            states = _States(i, j, found[i, j])
            history.append(states)
        at = int(states.seconds.argmin())
        self._known = float(states.seconds[at])
        self.best = self._known, self._trace(shape, history, at)

    def _moves(self, shape: _Loop, device: int, states: _States, limit: float) -> Iterator[_Moved]:
        """Yield every way to give `device` its cells."""
        prefix, num_cells = self._layout.prefix, self._layout.num_cells
        left = self._layout.num_stages // 2 - device - 1  # devices after this one
        if not left:
            yield from shape.ends(states)
            return
        for down in range(1, num_cells):
            i = np.minimum(states.first + down, num_cells)
            near = prefix[i] - prefix[states.first] < limit
            near &= shape.room(i, states.second + shape.step) >= left
            ahead = states.only(near)
            for up in range(1, num_cells):
                if not len(ahead.first):
                    break
                self._work -= len(ahead.first) + _PER_MOVE
                if self._work < 0:
                    raise TooMuchWork
                i, j = ahead.first + down, ahead.second + shape.step * up
                taken = prefix[i] - prefix[ahead.first] + abs(prefix[ahead.second] - prefix[j])
                rest = shape.rest(i, j) < left * limit
                yield ahead.only(rest), i[rest], j[rest]
                ahead = ahead.only((shape.room(i, j + shape.step) >= left) & (taken < limit))
            if not near.any():
                return

    def _loads(self, shape: _Loop, device: int, moved: _Moved) -> Array:
        layout = self._layout
        own = shape.sums(layout.starts, layout.ends, device, moved)
        loads: Array = np.maximum(moved[0].seconds, own)
        if layout.capped:
            needs = shape.sums(layout.start_bytes, layout.end_bytes, device, moved)
            loads[needs > layout.memory_bytes] = np.inf
        return loads

    def _trace(self, shape: _Loop, history: list[_States], at: int) -> tuple[int, ...]:
        """Return the cuts that lead to state `at` of the last device."""
        i, j = int(history[-1].first[at]), int(history[-1].second[at])
        value = float(history[-1].seconds[at])
        firsts, seconds = [i], [j]
        for device in reversed(range(len(history) - 1)):
            before = history[device]
            before = before.only((before.first < i) & ((j - before.second) * shape.step > 0))
            size = len(before.first)
            loads = self._loads(shape, device, (before, np.full(size, i), np.full(size, j)))
            at = int(np.flatnonzero(loads == value)[0])
            i, j = int(before.first[at]), int(before.second[at])
            value = float(before.seconds[at])
            firsts.append(i)
            seconds.append(j)
        return shape.cuts(firsts[::-1], seconds[::-1])
