"""Exact partition if no device holds two stages: dynamic programming over (stage, end).

Stages may be replicated and may differ in loads and memory, which enter only through the arrays of
`Layout`. A boundary costs its transfer, so a longer stage can be cheaper than a shorter one, and
greedy or bisection methods would be wrong. Only stages of at most `width` cells are considered,
until every longer one is known to be worse than the best found.
Source: the recurrence is that of PipeDream (Narayanan et al., SOSP 2019, section 3.1).
"""

import numpy as np

from stagewise.planning.partition.cut_costs import Layout

ScoredCuts = tuple[float, tuple[int, ...]]  # the busiest device's seconds, cuts


def cut_one_per_device(layout: Layout) -> ScoredCuts | None:
    """Return the best cuts of a layout with `one_per_device`; None if no cut fits the memory."""
    num_cells = layout.num_cells
    prefix = layout.prefix
    most = max(map(len, layout.placement))
    width = min(num_cells, 8 * -(-num_cells // layout.num_stages))
    while True:
        found = _within(layout, width)
        if width == num_cells:
            return found
        longer = (prefix[width + 1 :] - prefix[: -width - 1]).min(initial=np.inf) / most
        if found is not None and longer >= found[0]:
            return found
        width = min(num_cells, 4 * width)


def _within(layout: Layout, width: int) -> ScoredCuts | None:
    """Return the best cuts with at most `width` cells on every stage."""
    num_cells, num_stages = layout.num_cells, layout.num_stages
    ends = np.arange(num_cells + 1)[:, None]
    begins = ends - np.arange(width, 0, -1)[None, :]
    inside = begins >= 0
    begins = np.where(inside, begins, 0)
    best = np.full(num_cells + 1, np.inf)
    best[0] = 0.0
    choices = np.empty((num_stages, num_cells + 1), dtype=np.int64)
    for stage in range(num_stages):
        loads = layout.ends[stage][ends] - layout.starts[stage][begins]
        excluded = ~inside
        if layout.capped:
            needs = layout.end_bytes[stage][ends] - layout.start_bytes[stage][begins]
            excluded |= needs > layout.memory_bytes
        loads[excluded] = np.inf
        padded = np.concatenate([np.full(width, np.inf), best[:-1]])
        reached = np.lib.stride_tricks.sliding_window_view(padded, width)[: num_cells + 1]
        candidates = np.maximum(reached, loads)
        choices[stage] = candidates.argmin(axis=1)
        best = np.take_along_axis(candidates, choices[stage][:, None], axis=1)[:, 0]
    if not np.isfinite(best[num_cells]):
        return None
    cuts = [num_cells]
    for stage in reversed(range(num_stages)):
        cuts.append(cuts[-1] - (width - int(choices[stage, cuts[-1]])))
    return float(best[num_cells]), tuple(reversed(cuts))
