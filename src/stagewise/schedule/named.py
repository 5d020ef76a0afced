"""The named schedules, as pure functions of devices, microbatches and stages per device.

GPipe (Huang et al., arXiv:1811.06965, figure 2c) runs all forwards, then all backwards with
the last microbatch first, so that the microbatch whose activations are fresh goes back first.
1F1B (PipeDream-Flush, Narayanan et al., arXiv:2006.09503) alternates as early as it can:
stage k holds at most num_stages - k microbatches. A new schedule joins by a row in SCHEDULES.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

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


def forward_only(placement: Sequence[Sequence[int]], num_microbatches: int) -> Schedule:
    """Every stage's forwards in order, stage by stage: what `evaluate` and `predict` run."""
    num_devices = 1 + max(device for devices in placement for device in devices)
    schedule = Schedule(
        name="forward_only",
        programs=((),) * num_devices,
        placement=tuple(map(tuple, placement)),
        num_microbatches=num_microbatches,
    )
    programs: list[list[Instruction]] = [[] for _ in range(num_devices)]
    for stage in range(schedule.num_stages):
        for m in range(num_microbatches):
            forward = Instruction(stage, Kind.FORWARD, m)
            programs[schedule.device_of(stage, m)].append(forward)
    return replace(schedule, programs=tuple(map(tuple, programs)))


@dataclass(frozen=True, kw_only=True)
class NamedSchedule:
    """A row of SCHEDULES.

    `build(num_devices, num_microbatches, stages_per_device)` makes the schedule; each device has
    `stages_per_device` stages unless `takes_any` and others are asked for.
    """

    build: Callable[[int, int, int], Schedule]
    stages_per_device: int = 1
    takes_any: bool = False


SCHEDULES: dict[str, NamedSchedule] = {
    "gpipe": NamedSchedule(build=lambda devices, m, _: gpipe(devices, m)),
    "1f1b": NamedSchedule(build=lambda devices, m, _: one_f_one_b(devices, m)),
}


def stages_per_device(name: str, wanted: int | None = None) -> int:
    """How many stages each device of schedule `name` has; raises ScheduleError with a way out."""
    if name not in SCHEDULES:
        raise ScheduleError(
            f"there is no schedule {name!r}; choose one of {', '.join(sorted(SCHEDULES))}"
        )
    row = SCHEDULES[name]
    if wanted is None or wanted == row.stages_per_device:
        return row.stages_per_device
    if not row.takes_any or wanted < 1:
        need = "at least 1" if row.takes_any else f"exactly {row.stages_per_device}"
        raise ScheduleError(f"{name} was asked for {wanted} stages per device but needs {need}")
    return wanted


def named_schedule(
    name: str, num_devices: int, num_microbatches: int, per_device: int | None = None
) -> Schedule:
    """Build the schedule called `name`; raises ScheduleError with the names there are.

    It has `num_devices * per_device` stages; by default as many per device as the row says.
    """
    wanted = stages_per_device(name, per_device)
    for what, number in (("num_devices", num_devices), ("num_microbatches", num_microbatches)):
        if number < 1:
            raise ScheduleError(f"{what} is {number}; a schedule needs at least 1")
    return SCHEDULES[name].build(num_devices, num_microbatches, wanted)


def _run(stage: int, kind: Kind, microbatches: Iterable[int]) -> Program:
    return tuple(Instruction(stage, kind, m) for m in microbatches)


def _one_stage_per_device(
    name: str, program: Callable[[int], Program], num_stages: int, num_microbatches: int
) -> Schedule:
    return Schedule(
        name=name,
        programs=tuple(program(stage) for stage in range(num_stages)),
        placement=tuple((stage,) for stage in range(num_stages)),
        num_microbatches=num_microbatches,
    )
