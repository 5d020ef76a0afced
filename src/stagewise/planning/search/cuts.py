"""The cuts worth trying for an option, and what is known of them.

Memory of a device is `state_factor` bytes per parameter byte (parameter, gradient, and two moments
of Adam in the same dtype make 4) and the peak of what is kept for the backward pass. A cut is made
for time alone, or for time under the cap, by the microbatches that the schedule holds at its worst
moment; whether it then fits is for the simulation to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stagewise.costs import CellCost, LinkCost, boundary_seconds, load_seconds
from stagewise.errors import ScheduleError
from stagewise.planning.fast_simulate import held_microbatches
from stagewise.planning.partition.place import place
from stagewise.planning.partition.problem import (
    MemoryNeeds,
    Placement,
    cuts_of,
    layout,
    memory_needs,
)
from stagewise.planning.partition.replicated import replicated_partition
from stagewise.planning.search.candidates import (
    Option,
    placement_of,
    replicated_schedule,
    schedule_for,
)
from stagewise.schedule import Schedule, schedule_row
from stagewise.units import size_in_words

_TOLERANCE = 0.002  # a partition this near to its bound is near enough for a search
_MAX_WORK, _KICKS = 2_000_000, 4  # see `place`


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan is made for."""

    num_devices: int
    link: LinkCost
    memory_bytes: float
    state_factor: float


@dataclass
class SearchWork:
    """What a search has done."""

    partitions: int = 0
    simulations: int = 0
    instructions: int = 0  # simulated


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A schedule and a cut for it; the busiest device has at most `gap` more than the least."""

    option: Option
    schedule: Schedule
    balance: tuple[int, ...]
    gap: float = 0.0


class Cutter:
    """Makes cuts; those that several options share are made once."""

    def __init__(self, machine: Machine, work: SearchWork) -> None:
        self._machine, self._work = machine, work
        self._known: dict[object, tuple[tuple[int, ...], float] | None] = {}
        self._near: dict[object, tuple[tuple[int, ...], float]] = {}  # for other microbatches
        self._schedules: dict[Option, Schedule] = {}

    def cut(
        self, option: Option, cells: Sequence[CellCost], *, recomputing: bool, capped: bool
    ) -> Cut | str:
        """The best cut for time, under the memory cap if `capped`; or why there is none.

        For a step in which everything is recomputed, or nothing.
        """
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
            if least > option.num_devices * self._machine.memory_bytes:
                return (
                    f"at least {size_in_words(least)} are needed on all devices, which have "
                    f"{size_in_words(option.num_devices * self._machine.memory_bytes)}"
                )
        partition = self._partition(option, cells, recomputing, needs)
        if partition is None:
            return "no cut fits the memory"
        balance, gap = partition
        return Cut(option=option, schedule=schedule, balance=balance, gap=gap)

    def _schedule(self, option: Option) -> Schedule:
        if option not in self._schedules:
            self._schedules.clear()  # they are large, and options come one after the other
            self._schedules[option] = schedule_for(option)
        return self._schedules[option]

    def _needs(
        self, cells: Sequence[CellCost], inputs: Sequence[int], graphs: Sequence[int]
    ) -> MemoryNeeds:
        return memory_needs(
            cells,
            memory_bytes=self._machine.memory_bytes,
            inputs=inputs,
            graphs=graphs,
            state_factor=self._machine.state_factor,
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
        key = (*group, option.num_microbatches)
        if key not in self._known:
            seconds = _loads(option, cells, recomputing)
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
        transfers = boundary_seconds(cells, self._machine.link)
        if near := self._near.get(group):  # other microbatches' cut may be as good for these
            chain = layout(placement, seconds, transfer_seconds=transfers, memory=needs)
            gap = chain.busiest_seconds(cuts_of(near[0])) / max(chain.least_seconds, 1e-300) - 1
            if gap <= max(near[1], _TOLERANCE):
                return near[0], gap
        self._work.partitions += 1
        made = place(
            placement,
            seconds,
            transfer_seconds=transfers,
            memory=needs,
            max_nodes=0,
            max_work=_MAX_WORK,
            kicks=_KICKS,
            tolerance=_TOLERANCE,
        )
        if made is None:
            return None
        least = layout(placement, seconds, transfer_seconds=transfers).least_seconds
        self._near[group] = made.balance, made.seconds / max(least, 1e-300) - 1
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
            return "no cut fits the memory"
        if max(made.replicas) == 1:
            return "no stage gains from a second device"
        schedule = replicated_schedule(option, made.replicas)
        return Cut(option=option, schedule=schedule, balance=made.balance)


def _loads(option: Option, cells: Sequence[CellCost], recomputing: bool) -> list[float]:
    """What each cell adds to its device's load."""
    split = schedule_row(option.schedule).splits_backward
    forwards = 2 if recomputing else 1
    return [load_seconds(cell, forwards=forwards, split=split) for cell in cells]
