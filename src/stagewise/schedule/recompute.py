"""Recomputation as a pass over a schedule: which microbatches get an `R`, and where.

The `R` stands right before its backward. The executor waits for a gradient only when it
reaches the backward, so the recomputation runs while the gradient is still on its way.
On the last stage, which waits for no gradient, a backward that follows its own forward gets no
`R`: dropping the graph for no time at all would save no memory and cost a forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from stagewise.errors import ScheduleError
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.schedule import Program, Schedule

# policy -> does microbatch m of num_microbatches recompute?  (GPipe's three, as in torchgpipe)
POLICIES: dict[str, Callable[[int, int], bool]] = {
    "never": lambda m, num_microbatches: False,
    "always": lambda m, num_microbatches: True,
    "except_last": lambda m, num_microbatches: m != num_microbatches - 1,
}

_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


def check_policy(policy: str) -> None:
    """Raise ScheduleError unless `policy` is one of POLICIES."""
    if policy not in POLICIES:
        raise ScheduleError(
            f"there is no recompute policy {policy!r}; choose one of {', '.join(sorted(POLICIES))}"
        )


def with_recompute(schedule: Schedule, policy: str) -> Schedule:
    """Return `schedule` with the recomputations of `policy` inserted.

    A split backward gets its `R` before its `I`, and `W` uses the same graph. Raises ScheduleError
    for an unknown policy, or where the schedule has recomputations of its own.
    """
    check_policy(policy)
    if policy != "never" and schedule.recomputed:
        raise ScheduleError(
            f"schedule {schedule.name!r} has recomputations of its own, so the policy {policy!r} "
            "cannot be added; take them out, or use the policy 'never'"
        )
    wanted, last = POLICIES[policy], schedule.num_stages - 1

    def rewrite(program: Program) -> Program:
        out: list[Instruction] = []
        for instruction in program:
            stage, m = instruction.stage, instruction.microbatch
            fresh = stage == last and out[-1:] == [Instruction(stage, Kind.FORWARD, m)]
            if (
                instruction.kind in _BACKWARDS
                and wanted(m, schedule.num_microbatches)
                and not fresh
            ):
                out.append(Instruction(stage, Kind.RECOMPUTE, m))
            out.append(instruction)
        return tuple(out)

    return replace(schedule, programs=tuple(map(rewrite, schedule.programs)))


Segments = tuple[tuple[int, bool], ...]  # of one stage: (number of cells, recomputed?)


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
