"""The optimal contiguous partition: the least possible load of the busiest stage.

Problem: cut n cells into K non-empty runs so that the largest load is least. A stage's load is
the time of its cells plus the transfers at its two boundaries, so a longer stage may be cheaper
than a shorter one, and greedy or bisecting methods are wrong.
Idea: dynamic programming over (stages, prefix), exact for any loads, restricted to windows
whose cells alone stay within an upper bound on the answer. If the result respects the bound, no
partition outside the windows can be better; if not, the bound was too low and is doubled.
Source: the recurrence is that of PipeDream (Narayanan et al., SOSP 2019, section 3.1).
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from stagewise.errors import PlanError
from stagewise.schedule import check_replicas


def partition(
    cell_seconds: Sequence[float],
    num_stages: int,
    *,
    transfer_seconds: Sequence[float] | None = None,
    replicas: Sequence[int] = (),
) -> tuple[int, ...]:
    """Return how many cells each stage gets, such that the busiest stage's load is least.

    `cell_seconds[i]` is cell i's time; `transfer_seconds[i]`, one fewer, the time that the
    boundary behind cell i costs each of its two stages if it is cut there. A stage's load is
    shared by its `replicas`, if they are given.

    >>> partition([1, 1, 1, 1, 1, 1, 1], 4)
    (1, 2, 2, 2)
    """
    seconds = np.asarray(cell_seconds, dtype=np.float64)
    num_cells = len(seconds)
    check_counts(num_cells, num_stages)
    transfers = np.zeros(num_cells + 1)
    if transfer_seconds is not None:
        if len(transfer_seconds) != num_cells - 1:
            raise PlanError(
                f"got {len(transfer_seconds)} transfer times for {num_cells} cells; "
                f"give one for each of the {num_cells - 1} inner boundaries"
            )
        transfers[1:-1] = transfer_seconds
    if not (np.isfinite(seconds).all() and np.isfinite(transfers).all()):
        raise PlanError("costs must be finite numbers; measure again or give a balance")
    if (seconds < 0).any() or (transfers < 0).any():
        raise PlanError("costs must not be negative; measure again or give a balance")
    if replicas:
        check_replicas(replicas, num_stages)
    shared_by = np.array(replicas or [1] * num_stages)
    # No partition can be better.
    least = max(seconds.sum() / shared_by.sum(), seconds.max() / shared_by.max())
    bound, width = least, 8 * -(-num_cells // num_stages)
    while True:
        load, balance, whole = _within(seconds, transfers, shared_by, bound, width)
        if load <= least or (load <= bound and whole):
            return balance
        if whole:
            bound = 2 * bound if bound else float(transfers.max())
        else:
            width *= 8


def bottleneck_seconds(
    cell_seconds: Sequence[float],
    balance: Sequence[int],
    *,
    transfer_seconds: Sequence[float] | None = None,
    replicas: Sequence[int] = (),
) -> float:
    """The busiest device's load under `balance`: the objective that `partition` minimises."""
    ends = accumulate(balance)
    transfers = [0.0, *(transfer_seconds or [0.0] * (len(cell_seconds) - 1)), 0.0]
    return max(
        (float(sum(cell_seconds[end - size : end])) + transfers[end - size] + transfers[end])
        / number
        for size, end, number in zip(balance, ends, replicas or [1] * len(balance), strict=True)
    )


def check_balance(balance: Sequence[int], num_cells: int, num_stages: int | None = None) -> None:
    """Raise PlanError unless `balance` places every one of `num_cells` cells on a stage."""
    if num_stages is not None and len(balance) != num_stages:
        raise PlanError(
            f"balance {list(balance)} has {len(balance)} stages but num_stages is {num_stages}; "
            "make them agree, or leave one out"
        )
    if not balance or any(size < 1 for size in balance):
        raise PlanError(f"balance {list(balance)} must give every stage at least one cell")
    if sum(balance) != num_cells:
        raise PlanError(
            f"balance {list(balance)} places {sum(balance)} cells but the model has {num_cells}; "
            "correct it, or leave balance out and let plan() choose"
        )


def check_counts(num_cells: int, num_stages: int) -> None:
    """Raise PlanError unless `num_cells` cells can fill `num_stages` stages."""
    if num_stages < 1:
        raise PlanError(f"num_stages is {num_stages}; it must be at least 1")
    if num_stages > num_cells:
        raise PlanError(
            f"{num_stages} stages need at least as many cells, but the model has {num_cells}; "
            f"use at most {num_cells} stages, or split the model into more layers"
        )


def _within(
    seconds: np.ndarray, transfers: np.ndarray, shared_by: np.ndarray, bound: float, width: int
) -> tuple[float, tuple[int, ...], bool]:
    """Best load and balance over stages of at most `width` cells that alone take at most `bound`
    on each device of the stage that has most.

    The third value tells whether `width` left no stage within `bound` out.
    """
    num_cells, num_stages = len(seconds), len(shared_by)
    bound = bound * shared_by.max()
    prefix = np.concatenate([[0.0], np.cumsum(seconds)])
    slack = 1e-9 * (prefix[-1] + bound)  # rounding in prefix sums must not shut a window
    sizes = np.arange(num_cells + 1) - np.searchsorted(prefix, prefix - bound - slack)
    whole = bool(sizes.max() <= width)
    width = min(width, int(sizes.max()))
    # loads[end, j]: a stage of the width - j cells before `end`; padding makes all rows alike.
    ends = np.arange(num_cells + 1)[:, None]
    starts = ends - np.arange(width, 0, -1)[None, :]
    inside = starts >= 0
    starts = np.where(inside, starts, 0)
    loads = prefix[ends] - prefix[starts] + transfers[starts] + transfers[ends]
    loads[~inside] = np.inf
    best = np.full(num_cells + 1, np.inf)
    best[0] = 0.0
    choices = np.empty((num_stages, num_cells + 1), dtype=np.int64)
    for stage in range(num_stages):
        padded = np.concatenate([np.full(width, np.inf), best[:-1]])
        reached = np.lib.stride_tricks.sliding_window_view(padded, width)[: num_cells + 1]
        candidates = np.maximum(reached, loads / shared_by[stage])
        choices[stage] = candidates.argmin(axis=1)
        best = np.take_along_axis(candidates, choices[stage][:, None], axis=1)[:, 0]
    if not np.isfinite(best[num_cells]):
        return float("inf"), (), whole
    balance, end = [], num_cells
    for stage in reversed(range(num_stages)):
        balance.append(width - int(choices[stage, end]))
        end -= balance[-1]
    return float(best[num_cells]), tuple(reversed(balance)), whole
