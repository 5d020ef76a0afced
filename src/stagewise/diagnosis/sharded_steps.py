"""The predicted step of a plan whose stages a mesh shards.

A measured plan knows nothing of shards: what is gathered, and how long that takes, is decided when
`parallelize` runs. So gathers and reductions take as long as the recorded steps show (of gathers,
the shortest: the others were also held up), and the rest what was planned. Gathered parameters are
kept from forward to backward, and measured with the activations.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from stagewise.costs import StageCost
from stagewise.planning import Plan, simulate
from stagewise.planning.plan_words import Figures
from stagewise.recording import RecordedStep, Recording
from stagewise.schedule import Instruction, Kind
from stagewise.schedule.instruction import KINDS
from stagewise.schedule.sharded import with_gathers
from stagewise.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class PredictedStep:
    """A plan's step, with the costs of its stages."""

    timeline: Timeline
    costs: tuple[StageCost, ...]

    @property
    def figures(self) -> Figures:
        return Figures.of(self.timeline, self.costs)


def has_shards(step: RecordedStep) -> bool:
    """Return whether a step gathers or reduces shards."""
    return any(map(_of_shards, _ran(step)))


def predicted_step(recording: Recording) -> PredictedStep | None:
    """Return what was predicted of the usual step; None if its plan has no costs, or if it is not
    a step of that plan (also where stages share their gathers).

    Raises PlanError if that is not a plan.
    """
    usual = recording.usual_step
    if usual is None or not 0 <= usual.plan < len(recording.plans):
        return None
    plan = Plan.from_json(json.dumps(dict(recording.plans[usual.plan])))
    ran = {*_ran(usual)}
    exchanges = {i for i in ran if _of_shards(i)}
    sharded = {i.stage for i in exchanges}
    if not plan.cells or len({i.microbatch for i in ran - exchanges}) < plan.num_microbatches:
        return None
    schedule = with_gathers(plan.needed_schedule, {stage: stage for stage in sharded})
    planned = {i for _, i in schedule.instructions()}
    every = planned | {i for _, i in plan.built_schedule.instructions()}
    if not ran <= every or exchanges != {i for i in planned if _of_shards(i)}:
        return None
    if not exchanges:
        return PredictedStep(timeline=plan.timeline, costs=plan.engine_costs)
    steps = [step for step in recording.steps if step.plan == usual.plan]
    costs = tuple(
        _with_exchange(cost, stage, steps) if stage in sharded else cost
        for stage, cost in enumerate(plan.engine_costs)
    )
    return PredictedStep(timeline=simulate(schedule, costs, plan.link), costs=costs)


def _with_exchange(cost: StageCost, stage: int, steps: Sequence[RecordedStep]) -> StageCost:
    times = _times(stage, steps)
    launches = [end - start for start, end in (*times[Kind.PREFETCH], *times[Kind.RESHARD])]
    starts = [start for start, _ in times[Kind.PREFETCH]]
    gathers = zip(starts, [end for _, end in times[Kind.UNSHARD]], strict=False)
    reductions = [end - start for start, end in times[Kind.REDUCE]]
    return replace(
        cost,
        launch_seconds=fmean(launches) if launches else 0.0,
        gather_seconds=min((end - start for start, end in gathers), default=0.0),
        reduce_seconds=fmean(reductions) if reductions else 0.0,
        gathered_bytes=cost.parameter_bytes,
    )


def _times(stage: int, steps: Sequence[RecordedStep]) -> Mapping[Kind, list[tuple[float, float]]]:
    """Return begin and end of what a stage's shards were for, by kind, in the order of time."""
    found: dict[Kind, list[tuple[float, float]]] = defaultdict(list)
    for step in steps:
        for span in step.timeline.spans:
            if span.instruction.stage == stage and _of_shards(span.instruction):
                found[span.instruction.kind].append((span.start_seconds, span.end_seconds))
    return found


def _ran(step: RecordedStep) -> list[Instruction]:
    return [event.what for event in step.events if isinstance(event.what, Instruction)]


def _of_shards(instruction: Instruction) -> bool:
    return KINDS[instruction.kind].of_shards
