"""Costs at any microbatch size, from measurements at two.

Problem: a search over the number of microbatches needs costs at each, and measuring takes time.
Idea: every cost has a fixed part (launching kernels, reading weights) and a part per sample, so it
is linear between two measured sizes. An operator that is faster per sample at a size in between
(data fits the cache, a better tile) is not captured.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from stagewise.costs import UNSCALED, CellCost, FarOutput


def interpolated(
    small: Sequence[CellCost], small_size: int, large: Sequence[CellCost], large_size: int
) -> Callable[[int], tuple[CellCost, ...]]:
    """Return a function from the number of samples of a microbatch to its costs, never below 0."""

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
        if each.name in UNSCALED or low is None or high is None:
            continue
        value = _number(share, low, high)
        changes[each.name] = round(value) if each.name.endswith("_bytes") else value
    far = tuple(
        FarOutput(a[0], *(round(_number(share, x, y)) for x, y in zip(a[1:], b[1:], strict=True)))
        for a, b in zip(small.far_outputs, large.far_outputs, strict=True)
    )
    return replace(small, far_outputs=far, **changes)  # type: ignore[arg-type]


def _number(share: float, low: float, high: float) -> float:
    return max(0.0, low + share * (high - low))
