"""What a search goes over: schedules of the table, stages per device, replicas, microbatches.

Everything that the search knows of schedules stands here: which there are (`options`), where they
put stages (`placement_of`) and what they do (`schedule_for`, `replicated_schedule`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stagewise.planning.partition.problem import Placement
from stagewise.schedule import SCHEDULES, Schedule, named_schedule, schedule_row

_MAX_PER_DEVICE = 4  # stages per device, where a schedule takes any number


@dataclass(frozen=True, kw_only=True)
class Option:
    """One schedule for one number of microbatches; what is cut and recomputed is still open."""

    schedule: str
    num_devices: int
    num_microbatches: int
    stages_per_device: int
    replicated: bool = False  # stages may have several devices each

    @property
    def num_stages(self) -> int:
        return self.num_devices * self.stages_per_device

    @property
    def num_instructions(self) -> int:
        """About how many a step has."""
        return 2 * self.num_stages * self.num_microbatches

    def __str__(self) -> str:
        per_device = self.stages_per_device
        each = f", {per_device} stages a device" if per_device > 1 else ""
        replicas = ", replicated stages" if self.replicated else ""
        return f"{self.schedule}, {self.num_microbatches} microbatches{each}{replicas}"


def options(
    num_devices: int,
    num_cells: int,
    num_microbatches: Sequence[int],
    schedules: Sequence[str] | None,
    replicas: bool,
) -> Iterator[Option]:
    """All that the table allows for so many devices and cells."""
    for name in SCHEDULES if schedules is None else schedules:
        row = schedule_row(name)
        counts = range(2, _MAX_PER_DEVICE + 1) if row.takes_any else [row.stages_per_device]
        for count in num_microbatches:
            for per_device in counts:
                option = Option(
                    schedule=name,
                    num_devices=num_devices,
                    num_microbatches=count,
                    stages_per_device=per_device,
                )
                if option.num_stages <= num_cells:
                    yield option
            if replicas and schedule_row(name).takes_replicas:
                yield Option(
                    schedule=name,
                    num_devices=num_devices,
                    num_microbatches=count,
                    stages_per_device=1,
                    replicated=True,
                )


def placement_of(option: Option) -> Placement:
    """Where the option's stages are; the number of microbatches does not matter for that."""
    return named_schedule(
        option.schedule, option.num_devices, 1, option.stages_per_device
    ).placement


def schedule_for(option: Option) -> Schedule:
    """The option's schedule, without recomputation; raises ScheduleError where there is none."""
    return named_schedule(
        option.schedule, option.num_devices, option.num_microbatches, option.stages_per_device
    )


def replicated_schedule(option: Option, replicas: Sequence[int]) -> Schedule:
    """The option's schedule with so many devices for each stage, numbered stage by stage."""
    count = option.num_microbatches
    return named_schedule(option.schedule, len(replicas), count, replicas=replicas)
