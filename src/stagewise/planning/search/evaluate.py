"""One way to run a model, evaluated: cut, recompute, simulate, and see whether it fits.

Where a step without recomputation is over the memory cap, the cut that is best under the cap is
tried, and then recomputation: optimal segments, and the policies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import isfinite
from typing import NamedTuple

from stagewise.costs import CellCost, LinkCost, StageCost, stage_costs
from stagewise.errors import PlanError
from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.partition.problem import Placement
from stagewise.planning.plan import Plan
from stagewise.planning.request import SEGMENTS
from stagewise.planning.search.bounds import least_option_seconds, least_step_seconds
from stagewise.planning.search.candidates import Option
from stagewise.planning.search.cuts import Cut, Cutter, Machine, SearchWork
from stagewise.planning.search.segments_within import segments_within
from stagewise.planning.synthesis.synthesise import synthesise
from stagewise.schedule import Schedule, Segments, refine, with_recompute
from stagewise.units import size_in_words


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A complete plan in short, and what it takes; `plan()` makes the Plan.

    `seconds` are those of the plan's timeline, and of summing the gradients of replicas after it.
    """

    option: Option
    balance: tuple[int, ...]
    placement: Placement
    recompute: str
    segments: tuple[Segments, ...] = ()
    programs: tuple[str, ...] = ()
    seconds: float
    partition_gap: float  # how far the cut's busiest device may be from the best cut's
    device_bytes: tuple[int, ...]
    busy_seconds: tuple[float, ...]
    cells: tuple[CellCost, ...] = field(repr=False)
    link: LinkCost = field(repr=False)

    @property
    def num_microbatches(self) -> int:
        return self.option.num_microbatches

    def __str__(self) -> str:
        return _in_words(self.option, self.recompute)

    def plan(self) -> Plan:
        """The plan."""
        named, per_device = not self.programs, self.option.stages_per_device
        return Plan(
            balance=self.balance,
            schedule=self.option.schedule,
            num_microbatches=self.num_microbatches,
            # Programs hold their recomputations already.
            recompute="never" if self.segments or self.programs else self.recompute,
            stages_per_device=per_device if named and not self.option.replicated else None,
            replicas=tuple(map(len, self.placement)) if self.option.replicated else (),
            programs=self.programs,
            segments=self.segments,
            cells=self.cells,
            link=self.link,
        )


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """What was looked at and not taken, and why, in words."""

    what: str
    reason: str
    bound_seconds: float = 0.0  # it takes no less
    lacks_memory: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class Evaluator:
    """Evaluates options on one machine; partitions that several options share are made once."""

    def __init__(self, machine: Machine, recompute: str) -> None:
        self.machine, self.work = machine, SearchWork()
        self._recompute = recompute
        self._cuts = Cutter(machine, self.work)

    def bound_seconds(self, option: Option, cells: Sequence[CellCost]) -> float:
        """No plan of this option takes less."""
        return least_option_seconds(option, cells, self._recompute)

    def estimate_seconds(self, option: Option, cells: Sequence[CellCost]) -> float:
        """What the option may take: its bound, and the bubble of equal stages (K - 1) / (v M)."""
        filling = (option.num_devices - 1) / option.stages_per_device / option.num_microbatches
        return self.bound_seconds(option, cells) * (1 + filling)

    def plain(
        self, option: Option, cells: Sequence[CellCost], better_than: float
    ) -> Tried | Rejected:
        """The option with its fastest cut, recomputing nothing that it was not told to."""
        recompute = "never" if self._recompute == "auto" else self._recompute
        way = _Way(recompute, recompute in ("except_last", "always"), False)
        return self._run(option, cells, way, better_than)

    def sparing(
        self, option: Option, cells: Sequence[CellCost], better_than: float
    ) -> Iterator[Tried | Rejected]:
        """The option in ways that need less memory: the fastest of each kind of recomputation."""
        fastest = self._cuts.cut(option, cells, recomputing=False, capped=False)
        if isinstance(fastest, Cut):
            costs = stage_costs(cells, fastest.balance)
            bound = least_step_seconds(fastest.schedule, costs, self.machine.link)
            if bound >= better_than:
                yield _too_slow(str(option), bound, better_than)
                return
        for recompute, ways in groupby(_SPARING, key=lambda way: way.recompute):
            if self._recompute not in ("auto", recompute):
                continue
            found = [self._run(option, cells, way, better_than) for way in ways]
            if fitting := [way for way in found if isinstance(way, Tried)]:
                best = min(fitting, key=lambda tried: tried.seconds)
                better_than = min(better_than, best.seconds)
                yield best
            else:
                yield found[-1]

    def _run(
        self, option: Option, cells: Sequence[CellCost], way: "_Way", better_than: float
    ) -> Tried | Rejected:
        cut = self._cuts.cut(option, cells, recomputing=way.recomputing, capped=way.capped)
        if isinstance(cut, Cut):
            return self._judged(cut, cells, way.recompute, better_than)
        return Rejected(what=_in_words(option, way.recompute), reason=cut, lacks_memory=True)

    def synthesised(self, tried: Tried, effort: int) -> Tried | Rejected:
        """The same cut under a schedule that is made for it."""
        costs = stage_costs(tried.cells, tried.balance)
        option = replace(tried.option, schedule="auto")
        try:
            schedule = synthesise(
                tried.placement,
                costs,
                tried.num_microbatches,
                self.machine.link,
                memory_bytes=[int(room) for room in self._room(tried.placement, costs)]
                if isfinite(self.machine.memory_bytes)
                else None,
                recompute=tried.recompute,
                effort=effort,
            )
        except PlanError as error:
            return Rejected(what=str(option), reason=str(error))
        programs = tuple(str(schedule).splitlines())
        cut = Cut(option=option, schedule=schedule, balance=tried.balance, gap=tried.partition_gap)
        found = self._outcome(cut, tried.cells, schedule, costs, tried.recompute)
        return replace(found, programs=programs) if isinstance(found, Tried) else found

    def _judged(
        self, cut: Cut, cells: Sequence[CellCost], recompute: str, better_than: float
    ) -> Tried | Rejected:
        """Whether a cut fits, and what it takes."""
        what = _in_words(cut.option, recompute)
        costs = stage_costs(cells, cut.balance)
        bound = least_step_seconds(cut.schedule, costs, self.machine.link)
        if bound >= better_than:
            return _too_slow(str(cut.option), bound, better_than)
        if recompute != SEGMENTS:
            schedule = with_recompute(cut.schedule, recompute)
            return self._outcome(cut, cells, schedule, costs, recompute)
        room = self._room(cut.schedule.placement, costs)
        segments = segments_within(cut.schedule, cells, cut.balance, room)
        if segments is None:
            return Rejected(what=what, reason="no segments fit the memory", lacks_memory=True)
        refined = refine(cut.schedule, segments)
        finer = stage_costs(cells, [size for parts in segments for size, _ in parts])
        return self._outcome(cut, cells, refined, finer, recompute, segments)

    def _outcome(
        self,
        cut: Cut,
        cells: Sequence[CellCost],
        schedule: Schedule,
        costs: Sequence[StageCost],
        recompute: str,
        segments: tuple[Segments, ...] = (),
    ) -> Tried | Rejected:
        self.work.simulations += 1
        self.work.instructions += sum(map(len, schedule.programs))
        outcome = outcome_of(schedule, costs, self.machine.link)
        reduced = self._reduce_seconds(schedule.placement, costs)
        state = self._state(schedule.placement, costs)
        needs = [int(s + peak) for s, peak in zip(state, outcome.peak_bytes, strict=True)]
        worst = max(range(len(needs)), key=needs.__getitem__)
        if needs[worst] > self.machine.memory_bytes:
            return Rejected(
                what=_in_words(cut.option, recompute),
                reason=f"device {worst} needs {size_in_words(needs[worst])} of "
                f"{size_in_words(self.machine.memory_bytes)}",
                lacks_memory=True,
            )
        return Tried(
            option=cut.option,
            balance=cut.balance,
            placement=cut.schedule.placement,
            recompute=recompute,
            segments=segments,
            seconds=max(map(sum, zip(outcome.end_seconds, reduced, strict=True))),
            partition_gap=cut.gap,
            device_bytes=tuple(needs),
            busy_seconds=outcome.busy_seconds,
            cells=tuple(cells),
            link=self.machine.link,
        )

    def _reduce_seconds(self, placement: Placement, costs: Sequence[StageCost]) -> list[float]:
        """What summing replicas' gradients adds at the end of each device's step: a ring.

        2 (r - 1) messages of 1/r of the gradients (Patarasuk and Yuan, 2009).
        """
        added = [0.0] * (1 + max(device for devices in placement for device in devices))
        for devices, cost in zip(placement, costs, strict=True):
            r = len(devices)
            each = self.machine.link.transfer_seconds(-(-cost.parameter_bytes // r))
            for device in devices:
                added[device] += 2 * (r - 1) * each if r > 1 else 0.0
        return added

    def _room(self, placement: Placement, costs: Sequence[StageCost]) -> list[float]:
        """What each device has left for activations."""
        return [self.machine.memory_bytes - state for state in self._state(placement, costs)]

    def _state(self, placement: Placement, costs: Sequence[StageCost]) -> list[float]:
        """Parameters, gradients and optimizer state of each device."""
        state = [0.0] * (1 + max(device for devices in placement for device in devices))
        for devices, cost in zip(placement, costs, strict=True):
            for device in devices:
                state[device] += self.machine.state_factor * cost.parameter_bytes
        return state


class _Way(NamedTuple):
    """How to recompute, and what the cut is made for: recomputing all, and the memory cap."""

    recompute: str
    recomputing: bool
    capped: bool


_SPARING = (
    _Way("never", False, True),
    _Way(SEGMENTS, False, False),
    _Way(SEGMENTS, True, False),
    _Way(SEGMENTS, True, True),
    _Way("except_last", True, False),
    _Way("except_last", True, True),
    _Way("always", True, False),
    _Way("always", True, True),
)


def _in_words(option: Option, recompute: str) -> str:
    return f"{option}" if recompute == "never" else f"{option}, recompute {recompute}"


def _too_slow(what: str, bound: float, best: float) -> Rejected:
    reason = f"its fastest cut takes {bound:.4g} s at least, and another plan {best:.4g} s"
    return Rejected(what=what, reason=reason, bound_seconds=bound)
