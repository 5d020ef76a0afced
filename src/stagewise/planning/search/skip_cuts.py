"""Cuts for models with skips: what jumps over stages costs links and senders, too.

Problem: the partitioners add up what crosses each boundary, but a skip between the two ends of a
U-Net crosses all or none: none where both ends are on one device, as placements in a V allow.
Idea: start from the cut without skips, move boundaries one by one or in pairs, and keep what the
simulator, which sends every skip, finds faster, or as fast with fewer bytes on the wire.
Source: the gain from both ends on one device is that of BitPipe's and Chimera's V placements.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from stagewise.costs import CellCost, LinkCost, stage_costs
from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.partition.cut_costs import Placement, balance_of, cuts_of
from stagewise.planning.search.descent import descended
from stagewise.schedule import Schedule

_MAX_SIMULATIONS = 120
_STEPS = 1, 2  # cells by which a boundary moves at once


def wire_bytes(placement: Placement, cells: Sequence[CellCost], balance: Sequence[int]) -> int:
    """Return the bytes that a microbatch sends between devices, there and back."""
    costs, total = stage_costs(cells, balance), 0
    for stage, cost in enumerate(costs):
        pairs = [(1, cost.output_bytes, cost.gradient_bytes), *cost.far_outputs]
        for distance, there, back in pairs:
            target = stage + distance
            if target < len(costs) and placement[stage] != placement[target]:
                total += there + back
    return total


def improved_for_skips(
    schedule: Schedule, cells: Sequence[CellCost], balance: Sequence[int], link: LinkCost
) -> tuple[int, ...]:
    """Return `balance`, or a cut near it that is faster with the cells' skips."""
    best = tuple(balance)
    if not any(cell.far_outputs for cell in cells):
        return best

    def rated(sizes: Sequence[int]) -> tuple[float, int]:
        seconds = outcome_of(schedule, stage_costs(cells, sizes), link).seconds
        return seconds, wire_bytes(schedule.placement, cells, sizes)

    return descended(best, rated, _neighbours, _MAX_SIMULATIONS)


def _neighbours(balance: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the cuts with one boundary moved, or two, towards each other or the same way."""
    cuts = cuts_of(balance)
    inner = range(1, len(cuts) - 1)
    pairs = [(a, b) for a in inner for b in inner if a < b]
    for by in (sign * step for step in _STEPS for sign in (1, -1)):
        for moves in (
            *({at: by} for at in inner),
            *({a: by, b: sign * by} for a, b in pairs for sign in (-1, 1)),
        ):
            moved = [cut + moves.get(at, 0) for at, cut in enumerate(cuts)]
            if all(a < b for a, b in pairwise(moved)):
                yield balance_of(moved)
