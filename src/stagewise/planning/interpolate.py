"""Costs at any size of microbatch, from measurements at two.

Problem: a search over the number of microbatches needs costs at each, and measuring takes time.
Idea: every cost is a fixed part (launching kernels, weights to read) and a part per sample, so it
is linear between two sizes that were measured. Where an operator is faster per sample at some size
between them (a cache that fits, a better tile), that does not show.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from stagewise.costs import CellCost

_FIXED = ("name", "parameter_bytes", "instruction_overhead")


def interpolated(
    small: Sequence[CellCost], small_size: int, large: Sequence[CellCost], large_size: int
) -> Callable[[int], tuple[CellCost, ...]]:
    """Costs of a microbatch of any number of samples; never below 0."""

    def at(size: int) -> tuple[CellCost, ...]:
        if size == large_size:
            return tuple(large)
        share = (size - small_size) / (large_size - small_size) if size != small_size else 0.0
        return tuple(_between(a, b, share) for a, b in zip(small, large, strict=True))

    return at


def _between(small: CellCost, large: CellCost, share: float) -> CellCost:
    changes: dict[str, float | int | None] = {}
    for each in fields(CellCost):
        low, high = getattr(small, each.name), getattr(large, each.name)
        if each.name in _FIXED or low is None or high is None:
            continue
        value = max(0.0, low + share * (high - low))
        changes[each.name] = round(value) if each.name.endswith("_bytes") else value
    return replace(small, **changes)  # type: ignore[arg-type]
