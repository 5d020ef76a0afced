"""The search space: schedules of the table, stages per device, replicas, microbatches.

Everything that the search knows about schedules is here: which there are (`options`), where they
place stages (`placement_of`) and their instructions (`schedule_for`, `replicated_schedule`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stagewise.costs import CellCost
from stagewise.errors import BatchError
from stagewise.planning.partition.cut_costs import Placement
from stagewise.schedule import SCHEDULES, Schedule, named_schedule, schedule_row

_MAX_PER_DEVICE = 4  # stages per device, if a schedule allows any number


@dataclass(frozen=True, kw_only=True)
class Option:
    """One schedule for one number of microbatches; cut and recomputation are still open."""

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
        """The approximate number of instructions in a step."""
        return 2 * self.num_stages * self.num_microbatches

    def __str__(self) -> str:
        per_device = self.stages_per_device
        each = f", {per_device} stages per device" if per_device > 1 else ""
        replicas = ", replicated stages" if self.replicated else ""
        return f"{self.schedule}, {self.num_microbatches} microbatches{each}{replicas}"


def costs_by_count(
    costs_at: Callable[[int], Sequence[CellCost]], counts: Sequence[int]
) -> tuple[dict[int, tuple[CellCost, ...]], list[tuple[int, str]]]:
    """Return the costs at every number of microbatches, and what cannot be divided so, and why.

    Raises BatchError if none is possible.
    """
    found, refused = dict[int, tuple[CellCost, ...]](), list[tuple[int, BatchError]]()
    for count in counts:
        try:
            found[count] = tuple(costs_at(count))
        except BatchError as error:  # such as a microbatch of one sample, where two are needed
            refused.append((count, error))
    if not found and refused:
        raise refused[0][1]
    return found, [(count, str(error)) for count, error in refused]


def options(
    num_devices: int,
    num_cells: int,
    num_microbatches: Sequence[int],
    schedules: Sequence[str] | None,
    replicas: bool,
) -> Iterator[Option]:
    """Yield all options that the table allows for these numbers of devices and cells."""
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
    """Return where the option's stages are, which does not depend on the microbatches."""
    return named_schedule(
        option.schedule, option.num_devices, 1, option.stages_per_device
    ).placement


def schedule_for(option: Option) -> Schedule:
    """Return the option's schedule, without recomputation; raise ScheduleError if impossible."""
    return named_schedule(
        option.schedule, option.num_devices, option.num_microbatches, option.stages_per_device
    )


def replicated_schedule(option: Option, replicas: Sequence[int]) -> Schedule:
    """Return the option's schedule with `replicas[s]` devices for stage s."""
    count = option.num_microbatches
    return named_schedule(option.schedule, len(replicas), count, replicas=replicas)
