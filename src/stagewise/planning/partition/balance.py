"""A balance: how many cells each stage gets, and the resulting load of the busiest device."""

from collections.abc import Sequence
from itertools import accumulate

from stagewise.errors import PlanError


def bottleneck_seconds(
    cell_seconds: Sequence[float],
    balance: Sequence[int],
    *,
    transfer_seconds: Sequence[float] | None = None,
    replicas: Sequence[int] = (),
) -> float:
    """Return the busiest device's load under `balance`, if no device holds two stages."""
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
            "correct one, or leave it out"
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
