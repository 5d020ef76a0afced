"""Partition for any placement: a mixed-integer programme, and a descent that starts it.

Problem: where devices hold several stages, their loads are sums over the whole chain, and no
dynamic programme over prefixes is exact. Idea: a cut chooses one boundary, seconds and bytes are
linear in the choices, and that each stage begins behind the one before is one row per boundary:

    x[s, i] = 1 where stage s begins with cell i;  sum_i x[s, i] = 1
    sum_{j <= i} x[s + 1, j] <= sum_{j < i} x[s, j]
    seconds of device d = sum of its stages' (ends - starts) <= z,  z least

HiGHS (Huangfu and Hall, 2018; through scipy.optimize.milp) solves it by branch and bound and says
what it has proven. Numbers are scaled, since its tolerances are absolute.
"""

import ctypes
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from stagewise.planning.partition.problem import Array, Layout

_SCALE = 1000.0  # the known solution's seconds, in the programme's unit
_POWER, _SWEEPS = 12, 20
_WIDTH = 4  # times the mean: the longest stage that the descent looks at


def branch_and_bound(
    layout: Layout, better_than: float, max_nodes: int
) -> tuple[tuple[int, ...] | None, float]:
    """(cuts, proven bound): cuts are None where none were found that beat `better_than` seconds."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    num_stages, num_cells = layout.num_stages, layout.num_cells
    if not np.isfinite(better_than):
        better_than = float(layout.cell_seconds.sum() + 2 * layout.transfers.sum()) or 1.0
    width = num_cells + 1
    num_choices = (num_stages + 1) * width  # stage `num_stages` begins behind the last cell
    scale = _SCALE / better_than if better_than else 1.0
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    low: list[float] = []
    high: list[float] = []

    def row(entries: list[tuple[int, float]], least: float, most: float) -> None:
        at = len(low)
        for column, value in entries:
            rows.append(at)
            columns.append(column)
            values.append(value)
        low.append(least)
        high.append(most)

    for s in range(num_stages + 1):
        row([(s * width + i, 1.0) for i in range(width)], 1, 1)
    for s in range(num_stages):
        for i in range(width):
            here = [(s * width + j, -1.0) for j in range(i)]
            row([((s + 1) * width + j, 1.0) for j in range(i + 1)] + here, -np.inf, 0)
    for own in layout.devices:
        load, need = _sums(layout.starts, layout.ends, own), None
        row([*_entries(load * scale), (num_choices, -1.0)], -np.inf, 0)
        if layout.capped:
            need = _sums(layout.start_bytes, layout.end_bytes, own)
            most = layout.memory_bytes
            row(_entries(need / max(most, 1.0)), -np.inf, most / max(most, 1.0))
    upper = np.ones(num_choices + 1)
    upper[num_choices] = _SCALE
    for s in range(num_stages + 1):  # where stage s can begin at all
        choices = upper[s * width : (s + 1) * width]
        choices[: s if s < num_stages else num_cells] = 0
        choices[num_cells - (num_stages - s) + 1 :] = 0
        if not s:
            choices[1:] = 0
    lower = np.zeros(num_choices + 1)
    lower[num_choices] = min(layout.least_seconds * scale, _SCALE)
    objective = np.zeros(num_choices + 1)
    objective[num_choices] = 1
    with _quiet_stdout():
        solved = milp(
            objective,
            integrality=np.r_[np.ones(num_choices), 0],
            bounds=Bounds(lower, upper),
            constraints=LinearConstraint(
                coo_matrix((values, (rows, columns)), shape=(len(low), num_choices + 1)).tocsc(),
                np.array(low),
                np.array(high),
            ),
            options={"node_limit": max_nodes, "mip_rel_gap": 0},
        )
    bound = layout.least_seconds
    if solved.mip_dual_bound is not None and np.isfinite(solved.mip_dual_bound):
        bound = max(bound, float(solved.mip_dual_bound) / scale)
    if solved.status == 2:  # infeasible: nothing takes as little as `better_than`
        return None, better_than
    if solved.x is None:
        return None, bound
    chosen = solved.x[:num_choices].reshape(num_stages + 1, width)
    return tuple(int(at) for at in chosen.argmax(axis=1)), bound


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS prints some of its findings past Python, whatever its options say."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    with suppress(AttributeError, ValueError):
        sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        with suppress(OSError, TypeError, AttributeError):  # no C library to be had by that name
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _sums(starts: Array, ends: Array, own: Array) -> Array:
    """Per choice: what it adds to a device that holds the stages `own`."""
    coefficients = np.zeros((len(own) + 1, starts.shape[1]))
    coefficients[:-1] -= own[:, None] * starts
    coefficients[1:] += own[:, None] * ends
    return coefficients.ravel()


def _entries(coefficients: Array) -> list[tuple[int, float]]:
    return [(int(at), float(coefficients[at])) for at in np.flatnonzero(coefficients)]


def descend(
    layout: Layout, cuts: tuple[int, ...], *, kicks: int, tolerance: float = 0
) -> tuple[int, ...]:
    """Better cuts than `cuts`, by cutting runs of stages anew while the others stay.

    A run of stages that share no device is cut by dynamic programming, so that the sum of the
    loads' powers is least: with a high power that is nearly the busiest load, but where one load
    cannot be lowered, others still are. Where no run gets better, some cuts are moved at random
    (always the same ones) and it is tried again, `kicks` times, unless the bound is reached within
    `tolerance`.
    """
    rng, runs = random.Random(0), _runs(layout)
    enough = layout.least_seconds * (1 + max(tolerance, 1e-9))
    best = _settled(layout, cuts, runs)
    for _ in range(kicks):
        if layout.busiest_seconds(best) <= enough:
            break
        found = _settled(layout, _kicked(best, rng), runs)
        best = min(best, found, key=layout.busiest_seconds)
    return best


def _settled(layout: Layout, cuts: tuple[int, ...], runs: list[tuple[int, int]]) -> tuple[int, ...]:
    best = cuts
    for _ in range(_SWEEPS):
        before = cuts
        for first, last in runs:
            cuts = _recut(layout, cuts, first, last)
            best = min(best, cuts, key=layout.busiest_seconds)
        if cuts == before:
            break
    return best


def _kicked(cuts: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """`cuts` with a third of them moved by a few cells, where there is room."""
    moved = list(cuts)
    for at in range(1, len(cuts) - 1):
        if rng.random() < 1 / 3:
            new = moved[at] + rng.choice([-2, -1, 1, 2])
            if moved[at - 1] < new < moved[at + 1]:
                moved[at] = new
    return tuple(moved)


def _runs(layout: Layout) -> list[tuple[int, int]]:
    """Runs (first, last) of stages on different devices, as long as can be, from many starts."""
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
    """`cuts` with the stages from `first` to before `last` cut anew."""
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
    """What the most loaded device of `stage` has besides it."""
    own = ends[stage, cuts[stage + 1]] - starts[stage, cuts[stage]]
    return float(max(loads[device] for device in layout.placement[stage]) - own)
