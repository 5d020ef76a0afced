"""Recomputation as a pass over a schedule: which microbatches get an `R`, and where.

The `R` comes right before its backward. The executor waits for a gradient only when it reaches the
backward, so the recomputation runs while the gradient is still in transit. The last stage waits
for no gradient: a backward there that directly follows its own forward gets no `R`, which would
cost a forward and save no memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from stagewise.errors import ScheduleError
from stagewise.schedule.instruction import KINDS, Instruction, Kind, kinds_with
from stagewise.schedule.schedule import Program, Schedule

# policy -> whether microbatch m of num_microbatches is recomputed (torchgpipe's three policies)
POLICIES: dict[str, Callable[[int, int], bool]] = {
    "never": lambda m, num_microbatches: False,
    "always": lambda m, num_microbatches: True,
    "except_last": lambda m, num_microbatches: m != num_microbatches - 1,
}

_BACKWARDS = kinds_with("inputs")


def check_policy(policy: str) -> None:
    """Raise ScheduleError unless `policy` is one of POLICIES."""
    if policy not in POLICIES:
        raise ScheduleError(
            f"there is no recompute policy {policy!r}; choose one of {', '.join(sorted(POLICIES))}"
        )


def with_recompute(schedule: Schedule, policy: str) -> Schedule:
    """Return `schedule` with the recomputations of `policy` inserted.

    A split backward gets its `R` before its `I`, and `W` uses the same graph. Raises ScheduleError
    for an unknown policy, or if the schedule already has recomputations.
    """
    check_policy(policy)
    if policy != "never" and schedule.recomputed:
        raise ScheduleError(
            f"schedule {schedule.name!r} already has recomputations, so the policy {policy!r} "
            "cannot be added; remove them, or use the policy 'never'"
        )
    wanted, last = POLICIES[policy], schedule.num_stages - 1
    programs = (
        _insert_recomputations(
            program, lambda i: wanted(i.microbatch, schedule.num_microbatches), last
        )
        for program in schedule.programs
    )
    return replace(schedule, programs=tuple(programs))


def _insert_recomputations(
    program: Iterable[Instruction], wanted: Callable[[Instruction], bool], last_stage: int
) -> Program:
    """Return `program` with an `R` before every `wanted` backward."""
    out: list[Instruction] = []
    for i in program:
        if i.kind in _BACKWARDS and wanted(i):
            m = i.microbatch
            if i.stage != last_stage or out[-1:] != [Instruction(i.stage, Kind.FORWARD, m)]:
                out.append(Instruction(i.stage, Kind.RECOMPUTE, m))
        out.append(i)
    return tuple(out)


Segments = tuple[tuple[int, bool], ...]  # of one stage: (number of cells, recomputed?)


def refine(schedule: Schedule, segments: Sequence[Segments], policy: str = "always") -> Schedule:
    """Return `schedule`, which has no recomputations, with every stage cut into its `segments`.

    Segments marked as recomputed are so for the microbatches that `policy` selects. As in
    `with_recompute`, a backward on the last stage that follows its own forward gets no `R`.
    """
    check_policy(policy)
    if len(segments) != schedule.num_stages or not all(segments):
        raise ScheduleError(
            f"got segments for {len(segments)} stages of a schedule of {schedule.num_stages}; "
            "give every stage one segment or more"
        )
    if schedule.recomputed:
        raise ScheduleError(
            f"schedule {schedule.name!r} already has recomputations; give segments or a policy"
        )
    firsts = list(accumulate((len(parts) for parts in segments), initial=0))
    recomputed = [recomputed for parts in segments for _, recomputed in parts]
    again = [
        POLICIES[policy](m, schedule.num_microbatches) for m in range(schedule.num_microbatches)
    ]

    def cut(program: Program) -> Iterator[Instruction]:
        for i in program:
            parts = range(firsts[i.stage], firsts[i.stage + 1])
            for stage in reversed(parts) if KINDS[i.kind].is_backward else parts:
                yield Instruction(stage, i.kind, i.microbatch)

    return replace(
        schedule,
        programs=tuple(
            _insert_recomputations(
                cut(program),
                lambda i: recomputed[i.stage] and again[i.microbatch],
                len(recomputed) - 1,
            )
            for program in schedule.programs
        ),
        placement=tuple(
            devices
            for devices, parts in zip(schedule.placement, segments, strict=True)
            for _ in parts
        ),
    )
