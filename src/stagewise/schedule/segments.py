"""Recomputation by segments, as a pass over a schedule: a segment is simply a finer stage.

A stage cut into parts becomes as many stages on the same device, whose instructions run back to
back: forward in order, backward in reverse, and right before the backward of a part that is
recomputed stands its `R`. So one part's activations are rebuilt at a time (Chen et al.,
arXiv:1604.06174), and whoever runs, checks or draws schedules needs to know nothing of segments.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from stagewise.errors import ScheduleError
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.schedule import Program, Schedule

Segments = tuple[tuple[int, bool], ...]  # of one stage: (number of cells, recomputed?)

_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


def refine(schedule: Schedule, segments: Sequence[Segments]) -> Schedule:
    """`schedule`, which recomputes nothing, with every stage cut into its `segments`.

    As in `with_recompute`, a backward on the last stage that follows its own forward gets no `R`.
    """
    if len(segments) != schedule.num_stages or not all(segments):
        raise ScheduleError(
            f"got segments for {len(segments)} stages of a schedule of {schedule.num_stages}; "
            "give every stage one segment or more"
        )
    if schedule.recomputed:
        raise ScheduleError(
            f"schedule {schedule.name!r} recomputes already; give segments or a policy"
        )
    firsts = list(accumulate((len(parts) for parts in segments), initial=0))
    last = firsts[-1] - 1

    def rewrite(program: Program) -> Program:
        out: list[Instruction] = []
        for i in program:
            parts = [
                (firsts[i.stage] + at, recomputed)
                for at, (_, recomputed) in enumerate(segments[i.stage])
            ]
            for stage, recomputed in parts if i.kind is Kind.FORWARD else reversed(parts):
                fresh = stage == last and out[-1:] == [
                    Instruction(stage, Kind.FORWARD, i.microbatch)
                ]
                if recomputed and i.kind in _BACKWARDS and not fresh:
                    out.append(Instruction(stage, Kind.RECOMPUTE, i.microbatch))
                out.append(Instruction(stage, i.kind, i.microbatch))
        return tuple(out)

    return replace(
        schedule,
        programs=tuple(map(rewrite, schedule.programs)),
        placement=tuple(
            devices
            for devices, parts in zip(schedule.placement, segments, strict=True)
            for _ in parts
        ),
    )
