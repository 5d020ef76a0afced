"""Recomputation in blocks within a stage, where that saves memory and costs no time.

Problem: recomputing a whole stage holds all its activations at the peak; block by block it holds
only one block's and every block's input. But only the recomputation before a stage's first backward
overlaps with waiting for the gradient: blocks can delay the end of a step by up to a forward per
stage, and the last stage recomputes nothing if its backward follows its forward.
Idea: a block that is kept saves a forward of every microbatch, which pays for that. Starting with
the device that keeps most, take the segments (`segments_front`) with the least memory with which
the simulated step takes no longer; the time they save is available in the next round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagewise.costs import stage_costs
from stagewise.planning.fast_simulate import held_microbatches, outcome_of
from stagewise.planning.plan import Plan
from stagewise.planning.search.segments import segments_front
from stagewise.schedule import Segments, needed_for, refine

INSTRUCTION_SECONDS = 1e-4  # the engine's overhead per instruction, if not measured
WORTH = 0.05  # smallest share of a device's activations that segments must save
_ROUNDS, _MAX_LABELS = 3, 200


def in_blocks(plan: Plan, *, at_any_time: bool = False) -> Plan:
    """Return `plan`, which recomputes by a policy, in blocks with which its step takes no longer.

    With `at_any_time`, in the blocks that keep least. A plan without measured cells, or with
    replicas (whose stages a running pipeline cannot cut), is returned unchanged.
    """
    if plan.recompute == "never" or not plan.cells or plan.replicas:
        return plan
    plan = replace(plan, segments=())
    best = whole = _Candidate.of(plan, tuple(((size, True),) for size in plan.balance))
    most = float("inf") if at_any_time else whole.seconds
    placement, held = plan.plain_schedule.placement, held_microbatches(plan.plain_schedule)
    ways = [_ways(plan, stage, in_flight) for stage, in_flight in enumerate(held)]
    for _ in range(_ROUNDS):
        before = best
        for stage in sorted(range(plan.num_stages), key=lambda s: -best.peak(placement[s][0])):
            best = _with_least(plan, stage, ways[stage], best, most)
        if best is before:
            break
    return plan if best is whole else replace(plan, segments=best.segments)


def _ways(plan: Plan, stage: int, in_flight: int) -> list[Segments]:
    """Return the possible segments of a stage, from the least memory to the least time."""
    start = sum(plan.balance[:stage])
    own = plan.cells[start : start + plan.balance[stage]]
    entering = plan.stage_costs[stage].input_bytes
    front = segments_front(own, in_flight=in_flight, input_bytes=entering, max_labels=_MAX_LABELS)
    ways = sorted((way for way in front if len(way.segments) > 1), key=lambda w: w.peak_bytes)
    return [way.segments for way in ways]


def _with_least(
    plan: Plan, stage: int, ways: Sequence[Segments], best: "_Candidate", most: float
) -> "_Candidate":
    """Return `best` with the first of `ways` that takes at most `most`, if it saves enough."""
    (device, *_), low, high = plan.plain_schedule.placement[stage], 0, len(ways)
    enough, found = (1 - WORTH) * best.peak(device), best
    while low < high:
        middle = (low + high) // 2
        parts = (*best.segments[:stage], ways[middle], *best.segments[stage + 1 :])
        candidate = _Candidate.of(plan, parts)
        if candidate.seconds > most:
            low = middle + 1
        else:
            high = middle
            found = candidate if candidate.peak(device) <= enough else found
    return found


@dataclass(frozen=True)
class _Candidate:
    segments: tuple[Segments, ...]
    seconds: float  # of a step
    peaks: tuple[int, ...]  # of activations, by device

    def peak(self, device: int) -> int:
        return self.peaks[device]

    @staticmethod
    def of(plan: Plan, segments: tuple[Segments, ...]) -> "_Candidate":
        schedule = refine(plan.plain_schedule, segments, plan.recompute)
        sizes = [size for parts in segments for size, _ in parts]
        costs = stage_costs(plan.cells, sizes, input_bytes=plan.input_bytes)
        outcome = outcome_of(needed_for(schedule, costs), costs, plan.link)
        seconds = outcome.seconds + INSTRUCTION_SECONDS * max(map(len, schedule.programs))
        return _Candidate(segments, seconds, outcome.peak_bytes)
