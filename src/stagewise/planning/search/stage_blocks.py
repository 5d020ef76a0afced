"""Recomputation in blocks inside a stage, where that saves memory at no time.

Problem: what recomputes a stage at once holds all of its activations at the peak; block by block it
holds one block's, and every block's input. But only what precedes the first backward of a stage is
run while its gradient is on the way: blocks delay a step's first gradients, and its end, by up to a
forward on each stage; and a last stage whose backward follows its forward recomputes nothing whole.
Idea: a block that is kept saves a forward of every microbatch, which pays for that. From the device
that keeps most on, take the segments (`segments_front`) that leave it least, as long as the
simulated step takes no longer; what they save pays for others in the next round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagewise.costs import stage_costs
from stagewise.planning.fast_simulate import held_microbatches, outcome_of
from stagewise.planning.plan import Plan
from stagewise.planning.search.segments import segments_front
from stagewise.schedule import Segments, refine

INSTRUCTION_SECONDS = 1e-4  # of the engine around each, where that was not measured
WORTH = 0.05  # of a device's activations: the least to save by a stage's segments
_ROUNDS, _MAX_LABELS = 3, 200


def in_blocks(plan: Plan, *, at_any_time: bool = False) -> Plan:
    """`plan` that recomputes by a policy, in blocks where its step takes no longer.

    With `at_any_time` in those that keep least. A plan without measured cells stays as it is, and
    one with replicas, whose stages a running pipeline cannot cut.
    """
    if plan.recompute == "never" or not plan.cells or plan.replicas:
        return plan
    plan = replace(plan, segments=())
    best = whole = _Tried.of(plan, tuple(((size, True),) for size in plan.balance))
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
    """Segments of a stage, those that need least memory, and most time, first."""
    start = sum(plan.balance[:stage])
    own = plan.cells[start : start + plan.balance[stage]]
    entering = plan.stage_costs[stage].input_bytes
    front = segments_front(own, in_flight=in_flight, input_bytes=entering, max_labels=_MAX_LABELS)
    ways = sorted((way for way in front if len(way.segments) > 1), key=lambda w: w.peak_bytes)
    return [way.segments for way in ways]


def _with_least(
    plan: Plan, stage: int, ways: Sequence[Segments], best: "_Tried", most: float
) -> "_Tried":
    """`best` with the first of `ways` for `stage` that is worth it and takes `most`, if any is."""
    (device, *_), low, high = plan.plain_schedule.placement[stage], 0, len(ways)
    enough, found = (1 - WORTH) * best.peak(device), best
    while low < high:
        middle = (low + high) // 2
        parts = (*best.segments[:stage], ways[middle], *best.segments[stage + 1 :])
        tried = _Tried.of(plan, parts)
        if tried.seconds > most:
            low = middle + 1
        else:
            high = middle
            found = tried if tried.peak(device) <= enough else found
    return found


@dataclass(frozen=True)
class _Tried:
    segments: tuple[Segments, ...]
    seconds: float  # of a step
    peaks: tuple[int, ...]  # of activations, by device

    def peak(self, device: int) -> int:
        return self.peaks[device]

    @staticmethod
    def of(plan: Plan, segments: tuple[Segments, ...]) -> "_Tried":
        schedule = refine(plan.plain_schedule, segments, plan.recompute)
        sizes = [size for parts in segments for size, _ in parts]
        costs = stage_costs(plan.cells, sizes, input_bytes=plan.input_bytes)
        outcome = outcome_of(schedule, costs, plan.link)
        seconds = outcome.seconds + INSTRUCTION_SECONDS * max(map(len, schedule.programs))
        return _Tried(segments, seconds, outcome.peak_bytes)
