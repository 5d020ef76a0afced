"""Which schedule is meant: by name, a schedule of one's own, or a function that makes one.

A name fixes how many stages each device has, or takes any; so stages, devices, or both say how
large it is.
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
    """A valid schedule, and how a Plan writes it down: by name, or by its programs."""

    built: Schedule
    stages_per_device: int | None = None
    replicas: tuple[int, ...] = ()  # devices per stage, where they say more than the rest
    programs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.built.name

    @property
    def like(self) -> ScheduleLike:
        """What chooses it again, with the same numbers."""
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
    """The schedule that is meant; of `num_stages` and `num_devices` one may be None.

    Both may be for a Schedule, which has its own, and for `replicas`, which are the devices of
    each stage. Raises PlanError where the numbers disagree, ScheduleError where there is no such
    schedule or it is invalid.
    """
    return chosen(
        PlanRequest(
            schedule=schedule,
            num_microbatches=num_microbatches,
            num_stages=num_stages,
            num_devices=num_devices,
            replicas=replicas,
        )
    )


def chosen(request: PlanRequest) -> ScheduleChoice:
    """The schedule that a request means which leaves nothing to the search."""
    count, schedule, replicas = request.num_microbatches, request.schedule, request.replicas
    num_stages, num_devices = request.num_stages, request.num_devices
    assert isinstance(count, int) and not isinstance(replicas, str), "the search chooses"
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
                "a function that makes the schedule needs to know for how many devices; give "
                "num_devices"
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
    with_recompute(schedule, request.recompute)  # which it may have of its own
    return _own(schedule)


def _own(schedule: Schedule) -> ScheduleChoice:
    """A schedule of one's own, which a Plan holds as programs."""
    shared_by = tuple(map(len, schedule.placement))
    says_all = max(shared_by) > 1 and schedule.placement == consecutive(shared_by)
    return ScheduleChoice(
        built=schedule,
        programs=tuple(str(schedule).splitlines()),
        replicas=shared_by if says_all else (),
    )


def _counts(name: str, num_stages: int | None, num_devices: int | None) -> tuple[int, int]:
    """Devices, and stages on each."""
    usual = stages_per_device(name)
    if num_stages is None:
        if num_devices is None:
            raise PlanError("neither num_stages nor num_devices is given; give one of them")
        return num_devices, usual
    if num_devices is None:
        if num_stages % usual:
            raise PlanError(
                f"{name} has {usual} stages on each device, which cannot be with {num_stages} "
                f"stages; make that a multiple of {usual}"
            )
        return num_stages // usual, usual
    if num_stages != num_devices * usual and (
        not schedule_row(name).takes_any or num_stages % num_devices
    ):
        need = "any number of" if schedule_row(name).takes_any else str(usual)
        raise PlanError(
            f"{num_stages} stages and {num_devices} devices disagree: {name} has {need} stages on "
            "each device, the same on all; leave one of the two out, or correct it"
        )
    return num_devices, num_stages // num_devices
