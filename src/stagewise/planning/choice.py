"""Build the requested schedule: by name, from a Schedule, or from a function that makes one.

A named schedule has a fixed number of stages per device, or allows any, so its size follows from
the number of stages, of devices, or both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagewise.errors import PlanError
from stagewise.planning.request import PlanRequest, ScheduleLike
from stagewise.schedule import (
    Schedule,
    consecutive,
    named_schedule,
    schedule_row,
    stages_per_device,
    validate,
    with_recompute,
)


@dataclass(frozen=True, kw_only=True)
class ScheduleChoice:
    """A valid schedule, and how a Plan stores it: by name, or by its programs."""

    built: Schedule
    stages_per_device: int | None = None
    replicas: tuple[int, ...] = ()  # devices per stage; empty if implied by the other fields
    programs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.built.name

    @property
    def like(self) -> ScheduleLike:
        """The argument that selects it again, given the same numbers."""
        return self.built if self.programs else self.name

    @property
    def num_stages(self) -> int:
        return self.built.num_stages

    @property
    def num_devices(self) -> int:
        return self.built.num_devices


def choose_schedule(
    schedule: ScheduleLike,
    num_microbatches: int,
    *,
    num_stages: int | None = None,
    num_devices: int | None = None,
    replicas: Sequence[int] = (),
) -> ScheduleChoice:
    """Return the requested schedule; one of `num_stages` and `num_devices` may be None.

    Both may be None for a Schedule or with `replicas` (devices per stage), which imply them. Raises
    PlanError if the numbers disagree, ScheduleError if the schedule is unknown or invalid.
    """
    return requested_schedule(
        PlanRequest(
            schedule=schedule,
            num_microbatches=num_microbatches,
            num_stages=num_stages,
            num_devices=num_devices,
            replicas=replicas,
        )
    )


def requested_schedule(request: PlanRequest) -> ScheduleChoice:
    """Return the schedule of a request that leaves nothing to the search."""
    count, schedule, replicas = request.num_microbatches, request.schedule, request.replicas
    num_stages, num_devices = request.num_stages, request.num_devices
    assert isinstance(count, int) and not isinstance(replicas, str), "left to the search"
    if replicas:
        num_stages, num_devices = len(replicas), sum(replicas)
    if isinstance(schedule, str) and replicas:
        built = named_schedule(schedule, len(replicas), count, replicas=replicas)
        return ScheduleChoice(built=built, replicas=tuple(replicas))
    if isinstance(schedule, str):
        devices, each = _counts(schedule, num_stages, num_devices)
        own = None if each == schedule_row(schedule).stages_per_device else each
        return ScheduleChoice(
            built=named_schedule(schedule, devices, count, each), stages_per_device=own
        )
    if not isinstance(schedule, Schedule):
        devices = num_devices if num_devices is not None else num_stages or 0
        if not devices:
            raise PlanError(
                "a function that makes the schedule needs the number of devices; give num_devices"
            )
        schedule = schedule(devices, count)
    if replicas and len(replicas) == schedule.num_stages:
        schedule = replace(schedule, placement=consecutive(replicas))
    validate(schedule)
    for what, got, wanted in (
        ("stages", schedule.num_stages, num_stages),
        ("devices", schedule.num_devices, num_devices),
        ("microbatches", schedule.num_microbatches, count),
    ):
        if wanted is not None and got != wanted:
            raise PlanError(
                f"schedule {schedule.name!r} has {got} {what}, but {wanted} were asked for; ask "
                f"for {got}, or change the schedule"
            )
    with_recompute(schedule, request.recompute)  # raises if the schedule already recomputes
    return _custom(schedule)


def _custom(schedule: Schedule) -> ScheduleChoice:
    """Return the choice of a custom schedule, which a Plan stores as programs."""
    replicas = tuple(map(len, schedule.placement))
    is_consecutive = max(replicas) > 1 and schedule.placement == consecutive(replicas)
    return ScheduleChoice(
        built=schedule,
        programs=tuple(str(schedule).splitlines()),
        replicas=replicas if is_consecutive else (),
    )


def _counts(name: str, num_stages: int | None, num_devices: int | None) -> tuple[int, int]:
    """Return the number of devices, and of stages on each."""
    usual = stages_per_device(name)
    if num_stages is None:
        if num_devices is None:
            raise PlanError("neither num_stages nor num_devices is given; give one of them")
        return num_devices, usual
    if num_devices is None:
        if num_stages % usual:
            raise PlanError(
                f"{name} has {usual} stages on each device, so {num_stages} stages are not "
                f"possible; use a multiple of {usual}"
            )
        return num_stages // usual, usual
    if num_stages != num_devices * usual and (
        not schedule_row(name).takes_any or num_stages % num_devices
    ):
        need = "any number of stages" if schedule_row(name).takes_any else _stages(usual)
        raise PlanError(
            f"{num_stages} stages and {num_devices} devices disagree: {name} has {need} on each "
            "device, the same on all; leave one of the two out, or correct it"
        )
    return num_devices, num_stages // num_devices


def _stages(number: int) -> str:
    return f"{number} stage{'s' * (number != 1)}"
