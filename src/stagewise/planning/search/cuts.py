"""The cuts worth trying for an option, and how far they are from optimal.

A device's memory is `state_factor` bytes per parameter byte (parameter, gradient, and Adam's two
moments in the same dtype make 4) plus the peak of what is kept for the backward pass. A cut
minimises time alone, or time under the memory cap, estimated from the most microbatches that the
schedule holds; the simulation decides whether it really fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stagewise.costs import CellCost, LinkCost, StageCost, load_seconds, stage_costs
from stagewise.errors import ScheduleError
from stagewise.planning.fast_simulate import held_microbatches
from stagewise.planning.partition.cut_costs import (
    MemoryNeeds,
    Placement,
    cuts_of,
    layout,
    memory_needs,
)
from stagewise.planning.partition.place import Effort, boundary_seconds, place
from stagewise.planning.partition.replicated import replicated_partition
from stagewise.planning.partition.speeds import on_devices
from stagewise.planning.reserve import NO_RESERVE, Reserve
from stagewise.planning.search.candidates import (
    Option,
    placement_of,
    replicated_schedule,
    schedule_for,
)
from stagewise.schedule import Schedule, schedule_row
from stagewise.schedule.posting import POSTED_AHEAD
from stagewise.units import size_in_words

_EFFORT = Effort(max_nodes=0, max_work=2_000_000, kicks=4, tolerance=0.002)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a plan is made for."""

    num_devices: int
    link: LinkCost
    memory_bytes: tuple[float, ...]  # per device
    state_factor: float
    reserve: Reserve = NO_RESERVE
    speeds: tuple[float, ...] = ()  # of the devices; empty: all are equal

    def costs(
        self, cells: Sequence[CellCost], balance: Sequence[int], placement: Placement
    ) -> tuple[StageCost, ...]:
        """Return the costs of stages where they are placed."""
        return on_devices(stage_costs(cells, balance), placement, self.speeds)

    @property
    def usable_bytes(self) -> tuple[float, ...]:
        """The memory of each device without what it needs whatever the cut."""
        fixed = self.reserve.context_bytes + self.reserve.workspace_bytes
        return tuple(max(1.0, cap - fixed) for cap in self.memory_bytes)


@dataclass
class SearchWork:
    """How much work a search has done."""

    partitions: int = 0
    simulations: int = 0
    instructions: int = 0  # simulated


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A schedule and a cut for it, whose largest load is within `gap` of the optimum."""

    option: Option
    schedule: Schedule
    balance: tuple[int, ...]
    gap: float = 0.0


class Cutter:
    """Makes cuts; a cut shared by several options is made once."""

    def __init__(self, machine: Machine, work: SearchWork) -> None:
        self._machine, self._work = machine, work
        self._known: dict[object, tuple[tuple[int, ...], float] | None] = {}
        self._similar: dict[object, tuple[tuple[int, ...], float]] = {}  # for other microbatches
        self._schedules: dict[Option, Schedule] = {}

    def cut(
        self, option: Option, cells: Sequence[CellCost], *, recomputing: bool, capped: bool
    ) -> Cut | str:
        """Return the fastest cut, under the memory cap if `capped`, or why there is none.

        If `recomputing`, everything is recomputed; otherwise, nothing.
        """
        if option.replicated and self._machine.speeds:
            return "stages on several devices need equally fast ones"
        if option.replicated:
            return self._replicated(option, cells, recomputing, capped)
        try:
            schedule = self._schedule(option)
        except ScheduleError as error:
            return str(error).splitlines()[0]
        needs = None
        if capped:
            held = held_microbatches(schedule)
            needs = self._needs(cells, held, (1,) * len(held) if recomputing else held)
            least = sum(needs.state) + min(needs.graphs) * sum(needs.kept)
            together = sum(self._machine.usable_bytes)
            if least > together:
                return (
                    f"all devices together need at least {size_in_words(least)}, and have "
                    f"{size_in_words(together)}"
                )
        partition = self._partition(option, cells, recomputing, needs)
        if partition is None:
            return "no cut fits into memory"
        balance, gap = partition
        return Cut(option=option, schedule=schedule, balance=balance, gap=gap)

    def _schedule(self, option: Option) -> Schedule:
        if option not in self._schedules:
            self._schedules.clear()  # schedules are large, and used for one option at a time
            self._schedules[option] = schedule_for(option)
        return self._schedules[option]

    def _needs(
        self, cells: Sequence[CellCost], inputs: Sequence[int], graphs: Sequence[int]
    ) -> MemoryNeeds:
        return memory_needs(
            cells,
            memory_bytes=self._machine.usable_bytes,
            inputs=inputs,
            graphs=graphs,
            state_factor=self._machine.state_factor,
            posted=POSTED_AHEAD if self._machine.reserve.posts else 0,
        )

    def _partition(
        self,
        option: Option,
        cells: Sequence[CellCost],
        recomputing: bool,
        needs: MemoryNeeds | None,
    ) -> tuple[tuple[int, ...], float] | None:
        placement = placement_of(option)
        memory = (needs.inputs, needs.graphs) if needs else None
        group = (placement, recomputing, schedule_row(option.schedule).splits_backward, memory)
        seconds = _loads(option, cells, recomputing)
        key = (placement, tuple(seconds), memory)
        if key not in self._known:
            self._known[key] = self._made(placement, cells, seconds, needs, group)
        return self._known[key]

    def _made(
        self,
        placement: Placement,
        cells: Sequence[CellCost],
        seconds: Sequence[float],
        needs: MemoryNeeds | None,
        group: object,
    ) -> tuple[tuple[int, ...], float] | None:
        transfers, speeds = boundary_seconds(cells, self._machine.link), self._machine.speeds
        if known := self._similar.get(group):  # may be as good for this number of microbatches
            chain = layout(
                placement, seconds, transfer_seconds=transfers, memory=needs, speeds=speeds
            )
            gap = chain.busiest_seconds(cuts_of(known[0])) / max(chain.least_seconds, 1e-300) - 1
            if gap <= max(known[1], _EFFORT.tolerance):
                return known[0], gap
        self._work.partitions += 1
        made = place(
            placement,
            seconds,
            transfer_seconds=transfers,
            memory=needs,
            speeds=speeds,
            effort=_EFFORT,
        )
        if made is None:
            return None
        least = layout(placement, seconds, transfer_seconds=transfers, speeds=speeds).least_seconds
        self._similar[group] = made.balance, made.seconds / max(least, 1e-300) - 1
        return made.balance, made.gap

    def _replicated(
        self, option: Option, cells: Sequence[CellCost], recomputing: bool, capped: bool
    ) -> Cut | str:
        self._work.partitions += 1
        made = replicated_partition(
            _loads(option, cells, recomputing),
            option.num_devices,
            transfer_seconds=boundary_seconds(cells, self._machine.link),
            memory=self._needs(cells, (0,), (0,)) if capped else None,
            num_microbatches=option.num_microbatches,
            recomputed=recomputing,
        )
        if made is None:
            return "no cut fits into memory"
        if max(made.replicas) == 1:
            return "no stage benefits from a second device"
        schedule = replicated_schedule(option, made.replicas)
        return Cut(option=option, schedule=schedule, balance=made.balance)


def _loads(option: Option, cells: Sequence[CellCost], recomputing: bool) -> list[float]:
    """Return what each cell adds to its device's load."""
    split = schedule_row(option.schedule).splits_backward
    forwards = 2 if recomputing else 1
    return [load_seconds(cell, forwards=forwards, split=split) for cell in cells]
