"""The named schedules, as pure functions (num_stages, num_microbatches) -> Schedule.

GPipe (Huang et al., arXiv:1811.06965, figure 2c) runs all forwards, then all backwards with
the last microbatch first, so that the microbatch whose activations are fresh goes back first.
1F1B (PipeDream-Flush, Narayanan et al., arXiv:2006.09503) alternates as early as it can:
stage k holds at most num_stages - k microbatches. A new schedule joins by a row in SCHEDULES.
"""

from collections.abc import Callable, Iterable

from stagewise.errors import ScheduleError
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.schedule import Program, Schedule


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards in reverse order."""

    def program(stage: int) -> Program:
        forwards = _run(stage, Kind.FORWARD, range(num_microbatches))
        return forwards + _run(stage, Kind.BACKWARD, reversed(range(num_microbatches)))

    return _one_stage_per_device("gpipe", program, num_stages, num_microbatches)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """Warm up with num_stages - 1 - stage forwards, then one forward, one backward in turn."""

    def program(stage: int) -> Program:
        warmup = min(num_stages - 1 - stage, num_microbatches)
        steady = num_microbatches - warmup
        pairs = [
            Instruction(stage, kind, m + offset)
            for m in range(steady)
            for kind, offset in ((Kind.FORWARD, warmup), (Kind.BACKWARD, 0))
        ]
        cooldown = range(steady, num_microbatches)
        return (
            _run(stage, Kind.FORWARD, range(warmup))
            + tuple(pairs)
            + _run(stage, Kind.BACKWARD, cooldown)
        )

    return _one_stage_per_device("1f1b", program, num_stages, num_microbatches)


def forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """Every stage's forwards in order: what `evaluate` and `predict` run."""
    return _one_stage_per_device(
        "forward_only",
        lambda stage: _run(stage, Kind.FORWARD, range(num_microbatches)),
        num_stages,
        num_microbatches,
    )


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
}


def named_schedule(name: str, num_stages: int, num_microbatches: int) -> Schedule:
    """Build the schedule called `name`; raises ScheduleError with the names there are."""
    if name not in SCHEDULES:
        raise ScheduleError(
            f"there is no schedule {name!r}; choose one of {', '.join(sorted(SCHEDULES))}"
        )
    return SCHEDULES[name](num_stages, num_microbatches)


def _run(stage: int, kind: Kind, microbatches: Iterable[int]) -> Program:
    return tuple(Instruction(stage, kind, m) for m in microbatches)


def _one_stage_per_device(
    name: str, program: Callable[[int], Program], num_stages: int, num_microbatches: int
) -> Schedule:
    for what, number in (("num_stages", num_stages), ("num_microbatches", num_microbatches)):
        if number < 1:
            raise ScheduleError(f"{what} is {number}; a schedule needs at least 1")
    return Schedule(
        name=name,
        programs=tuple(program(stage) for stage in range(num_stages)),
        placement=tuple((stage,) for stage in range(num_stages)),
        num_microbatches=num_microbatches,
    )
