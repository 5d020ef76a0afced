"""A heuristic partition for any placement: a descent from known cuts, with random kicks.

Problem: if devices hold several stages, recutting all of them at once is a mixed-integer program.
Idea: a run of stages that share no device can be recut exactly by dynamic programming while the
others stay; repeat this over many runs, and leave local optima by moving some cuts at random.
"""

import random

import numpy as np

from stagewise.planning.partition.cut_costs import Array, Layout

_POWER, _SWEEPS = 12, 20
_WIDTH = 4  # times the mean: the longest stage considered


def improve_cuts(
    layout: Layout, cuts: tuple[int, ...], *, kicks: int, tolerance: float = 0
) -> tuple[int, ...]:
    """Return cuts no worse than `cuts`, improved run by run.

    A run is recut to minimise the sum of a high power of the loads: nearly the busiest load, but
    other loads still fall when that one cannot. At a local optimum some cuts are moved at random
    (with a fixed seed), `kicks` times, unless the lower bound is reached within `tolerance`.
    """
    rng, runs = random.Random(0), _runs(layout)
    enough = layout.least_seconds * (1 + max(tolerance, 1e-9))
    best = _local_optimum(layout, cuts, runs)
    for _ in range(kicks):
        if layout.busiest_seconds(best) <= enough:
            break
        found = _local_optimum(layout, _perturbed(best, rng), runs)
        best = min(best, found, key=layout.busiest_seconds)
    return best


def _local_optimum(
    layout: Layout, cuts: tuple[int, ...], runs: list[tuple[int, int]]
) -> tuple[int, ...]:
    best = cuts
    for _ in range(_SWEEPS):
        before = cuts
        for first, last in runs:
            cuts = _recut(layout, cuts, first, last)
            best = min(best, cuts, key=layout.busiest_seconds)
        if cuts == before:
            break
    return best


def _perturbed(cuts: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """Return `cuts` with about a third of them moved by one or two cells, where possible."""
    moved = list(cuts)
    for at in range(1, len(cuts) - 1):
        if rng.random() < 1 / 3:
            new = moved[at] + rng.choice([-2, -1, 1, 2])
            if moved[at - 1] < new < moved[at + 1]:
                moved[at] = new
    return tuple(moved)


def _runs(layout: Layout) -> list[tuple[int, int]]:
    """Return the longest runs (first, last) of stages on different devices, from many starts."""
    runs: list[tuple[int, int]] = []
    step = max(1, layout.num_stages // 32)
    for first in range(0, layout.num_stages - 1, step):
        seen: set[int] = set()
        last = first
        while last < layout.num_stages and not seen.intersection(layout.placement[last]):
            seen.update(layout.placement[last])
            last += 1
        if last - first > 1 and not any(a <= first and last <= b for a, b in runs):
            runs.append((first, last))
    return runs


def _recut(layout: Layout, cuts: tuple[int, ...], first: int, last: int) -> tuple[int, ...]:
    """Return `cuts` with the stages `first` to `last - 1` recut."""
    begin, end = cuts[first], cuts[last]
    num_cells, num_stages = end - begin, last - first
    width = min(num_cells - num_stages + 1, _WIDTH * -(-num_cells // num_stages))
    loads, needs = layout.device_seconds(cuts), layout.device_bytes(cuts)
    scale = max(layout.least_seconds, 1e-300)
    ends = np.arange(num_cells + 1)[:, None]
    begins = ends - np.arange(width, 0, -1)[None, :]
    rows, window = ends[:, 0], begins + width  # of `best`, padded
    outside = begins < 0
    ends, begins = begin + ends, begin + np.maximum(begins, 0)
    best = np.full(num_cells + 1, np.inf)
    best[0] = 0.0
    choices = []
    for stage in range(first, last):
        others = _others(layout, cuts, stage, loads, layout.starts, layout.ends)
        own = layout.ends[stage][ends] - layout.starts[stage][begins]
        powers = np.minimum((others + own) / scale, 1e12) ** _POWER
        if layout.capped:
            room = layout.memory_bytes - _others(
                layout, cuts, stage, needs, layout.start_bytes, layout.end_bytes
            )
            over = layout.end_bytes[stage][ends] - layout.start_bytes[stage][begins] - room
            powers += np.where(over > 0, 1e200 * (1 + over / layout.memory_bytes), 0)
        powers[outside] = np.inf
        padded = np.concatenate([np.full(width, np.inf), best[:-1]])
        candidates = padded[window] + powers
        choices.append(candidates.argmin(axis=1))
        best = candidates[rows, choices[-1]]
    if not np.isfinite(best[num_cells]):
        return cuts
    inner = [num_cells]
    for choice in reversed(choices):
        inner.append(inner[-1] - (width - int(choice[inner[-1]])))
    return (*cuts[:first], *(begin + at for at in reversed(inner)), *cuts[last + 1 :])


def _others(
    layout: Layout, cuts: tuple[int, ...], stage: int, loads: Array, starts: Array, ends: Array
) -> float:
    """Return the load that the busiest device of `stage` has from other stages."""
    own = ends[stage, cuts[stage + 1]] - starts[stage, cuts[stage]]
    return float(max(loads[device] for device in layout.placement[stage]) - own)
