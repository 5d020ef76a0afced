"""Evaluate one option: cut the chain, choose what to recompute, simulate, and check the memory.

If a step without recomputation exceeds the memory cap, the best cut under the cap is tried next,
then recomputation: optimal segments, and the policies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import isfinite
from typing import NamedTuple

from stagewise.costs import (
    CellCost,
    LinkCost,
    StageCost,
    state_bytes,
    trained_bytes,
)
from stagewise.errors import PlanError
from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.partition.cut_costs import Placement
from stagewise.planning.plan import Plan
from stagewise.planning.request import SEGMENTS
from stagewise.planning.search.bounds import least_option_seconds, least_step_seconds
from stagewise.planning.search.candidates import Option
from stagewise.planning.search.cuts import Cut, Cutter, Machine, SearchWork
from stagewise.planning.search.moved_recompute import with_moved_recomputations
from stagewise.planning.search.segments_within import segments_within
from stagewise.planning.search.skip_cuts import improved_for_skips
from stagewise.planning.synthesis.synthesise import synthesise
from stagewise.schedule import Schedule, Segments, needed_for, refine, with_recompute
from stagewise.units import size_in_words


@dataclass(frozen=True, kw_only=True)
class EvaluatedPlan:
    """A complete plan in short form, with its time and memory; `plan()` makes the Plan.

    `seconds` is the duration of the plan's timeline plus the summing of replicas' gradients.
    """

    option: Option
    balance: tuple[int, ...]
    placement: Placement
    recompute: str
    segments: tuple[Segments, ...] = ()
    programs: tuple[str, ...] = ()
    seconds: float
    partition_gap: float  # upper bound on the cut's relative distance to the optimum
    device_bytes: tuple[int, ...]
    busy_seconds: tuple[float, ...]
    cells: tuple[CellCost, ...] = field(repr=False)
    link: LinkCost = field(repr=False)
    speeds: tuple[float, ...] = ()

    @property
    def num_microbatches(self) -> int:
        return self.option.num_microbatches

    def __str__(self) -> str:
        return _in_words(self.option, self.recompute)

    def plan(self) -> Plan:
        """Return the Plan."""
        named, per_device = not self.programs, self.option.stages_per_device
        return Plan(
            balance=self.balance,
            schedule=self.option.schedule,
            num_microbatches=self.num_microbatches,
            # Programs already contain their recomputations.
            recompute="never" if self.segments or self.programs else self.recompute,
            stages_per_device=per_device if named and not self.option.replicated else None,
            replicas=tuple(map(len, self.placement)) if self.option.replicated else (),
            programs=self.programs,
            segments=self.segments,
            cells=self.cells,
            link=self.link,
            speeds=self.speeds,
        )


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """What was considered and rejected, and why."""

    what: str
    reason: str
    bound_seconds: float = 0.0  # lower bound on its step time
    lacks_memory: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class Evaluator:
    """Evaluates options on one machine; a partition shared by several options is made once."""

    def __init__(self, machine: Machine, recompute: str) -> None:
        self.machine, self.work = machine, SearchWork()
        self._recompute = recompute
        self.without_skips: dict[tuple[Placement, int], tuple[int, ...]] = {}  # cuts
        self._cuts = Cutter(machine, self.work)

    def bound_seconds(self, option: Option, cells: Sequence[CellCost]) -> float:
        """Return a lower bound for all plans of this option."""
        return least_option_seconds(option, cells, self._recompute)

    def estimate_seconds(self, option: Option, cells: Sequence[CellCost]) -> float:
        """Return the option's bound plus the bubble of equal stages, (K - 1) / (v M)."""
        bubble = (option.num_devices - 1) / option.stages_per_device / option.num_microbatches
        return self.bound_seconds(option, cells) * (1 + bubble)

    def plain(
        self, option: Option, cells: Sequence[CellCost], better_than: float
    ) -> EvaluatedPlan | Rejected:
        """Evaluate the option with its fastest cut and only the recomputation asked for."""
        recompute = "never" if self._recompute == "auto" else self._recompute
        way = _Way(recompute, recompute in ("except_last", "always"), False)
        return self._run(option, cells, way, better_than)

    def with_less_memory(
        self, option: Option, cells: Sequence[CellCost], better_than: float
    ) -> Iterator[EvaluatedPlan | Rejected]:
        """Evaluate ways that need less memory; yield the fastest of each kind of recomputation."""
        fastest = self._cuts.cut(option, cells, recomputing=False, capped=False)
        if isinstance(fastest, Cut):
            costs = self.machine.costs(cells, fastest.balance, fastest.schedule.placement)
            bound = least_step_seconds(fastest.schedule, costs, self.machine.link)
            if bound >= better_than:
                yield _too_slow(str(option), bound, better_than)
                return
        for recompute, ways in groupby(_LESS_MEMORY, key=lambda way: way.recompute):
            if self._recompute not in ("auto", recompute):
                continue
            found = [self._run(option, cells, way, better_than) for way in ways]
            if fitting := [one for one in found if isinstance(one, EvaluatedPlan)]:
                best = min(fitting, key=lambda plan: plan.seconds)
                better_than = min(better_than, best.seconds)
                yield best
            else:
                yield found[-1]

    def _run(
        self, option: Option, cells: Sequence[CellCost], way: "_Way", better_than: float
    ) -> EvaluatedPlan | Rejected:
        cut = self._cuts.cut(option, cells, recomputing=way.recomputing, capped=way.capped)
        if isinstance(cut, Cut):
            if not (way.capped or option.replicated or self.machine.speeds):
                link = self.machine.link
                where = cut.schedule.placement, option.num_microbatches
                self.without_skips[where] = cut.balance
                balance = improved_for_skips(cut.schedule, cells, cut.balance, link)
                cut = replace(cut, balance=balance)
            return self._evaluate(cut, cells, way.recompute, better_than)
        return Rejected(what=_in_words(option, way.recompute), reason=cut, lacks_memory=True)

    def synthesised(self, plan: EvaluatedPlan, effort: int) -> EvaluatedPlan | Rejected:
        """Evaluate the cut of `plan` under a schedule synthesised for it."""
        option, count = replace(plan.option, schedule="auto"), plan.num_microbatches
        costs = self.machine.costs(plan.cells, plan.balance, plan.placement)
        room, link = self._room(plan.placement, costs, count), self.machine.link
        capped = isfinite(max(self.machine.memory_bytes))
        try:
            schedule = synthesise(
                plan.placement,
                costs,
                count,
                link,
                memory_bytes=[*map(int, room)] if capped else None,
                recompute=plan.recompute,
                effort=effort,
            )
        except PlanError as error:
            return Rejected(what=str(option), reason=str(error))
        if schedule.recomputed and capped and self._recompute == "auto":
            schedule = with_moved_recomputations(schedule, costs, link, room, effort=effort // 3)
        programs = tuple(str(schedule).splitlines())
        cut = Cut(option=option, schedule=schedule, balance=plan.balance, gap=plan.partition_gap)
        found = self._outcome(cut, plan.cells, schedule, costs, plan.recompute)
        return replace(found, programs=programs) if isinstance(found, EvaluatedPlan) else found

    def _evaluate(
        self, cut: Cut, cells: Sequence[CellCost], recompute: str, better_than: float
    ) -> EvaluatedPlan | Rejected:
        """Return the time and memory of a cut, or why it is rejected."""
        what = _in_words(cut.option, recompute)
        costs = self.machine.costs(cells, cut.balance, where := cut.schedule.placement)
        bound = least_step_seconds(cut.schedule, costs, self.machine.link)
        if bound >= better_than:
            return _too_slow(str(cut.option), bound, better_than)
        if recompute != SEGMENTS:
            schedule = with_recompute(cut.schedule, recompute)
            return self._outcome(cut, cells, schedule, costs, recompute)
        room = self._room(where, costs, cut.option.num_microbatches)
        segments = segments_within(cut.schedule, cells, cut.balance, room)
        if segments is None:
            return Rejected(what=what, reason="no segments fit into memory", lacks_memory=True)
        refined = refine(cut.schedule, segments)
        sizes = [size for parts in segments for size, _ in parts]
        finer = self.machine.costs(cells, sizes, refined.placement)
        return self._outcome(cut, cells, refined, finer, recompute, segments)

    def _outcome(
        self,
        cut: Cut,
        cells: Sequence[CellCost],
        schedule: Schedule,
        costs: Sequence[StageCost],
        recompute: str,
        segments: tuple[Segments, ...] = (),
    ) -> EvaluatedPlan | Rejected:
        self.work.simulations += 1
        self.work.instructions += sum(map(len, schedule.programs))
        outcome = outcome_of(needed_for(schedule, costs), costs, self.machine.link)
        reduced = self._reduce_seconds(schedule.placement, costs)
        state = self._state(schedule.placement, costs, schedule.num_microbatches)
        needs = [int(s + peak) for s, peak in zip(state, outcome.peak_bytes, strict=True)]
        caps = self.machine.memory_bytes
        worst = max(range(len(needs)), key=lambda device: needs[device] / caps[device])
        if needs[worst] > caps[worst]:
            return Rejected(
                what=_in_words(cut.option, recompute),
                reason=f"device {worst} needs {size_in_words(needs[worst])} of "
                f"{size_in_words(caps[worst])}",
                lacks_memory=True,
            )
        return EvaluatedPlan(
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
            speeds=self.machine.speeds,
        )

    def _reduce_seconds(self, placement: Placement, costs: Sequence[StageCost]) -> list[float]:
        """Return the seconds that each device's ring all-reduce of replicas' gradients adds.

        It sends 2 (r - 1) messages of 1/r of the gradients (Patarasuk and Yuan, 2009).
        """
        added = [0.0] * (1 + max(device for devices in placement for device in devices))
        for devices, cost in zip(placement, costs, strict=True):
            r = len(devices)
            each = self.machine.link.transfer_seconds(-(-trained_bytes(cost) // r))
            for device in devices:
                added[device] += 2 * (r - 1) * each if r > 1 else 0.0
        return added

    def _room(
        self, placement: Placement, costs: Sequence[StageCost], num_microbatches: int
    ) -> list[float]:
        """Return the memory that each device has left for activations."""
        state = self._state(placement, costs, num_microbatches)
        return [cap - own for cap, own in zip(self.machine.memory_bytes, state, strict=True)]

    def _state(
        self, placement: Placement, costs: Sequence[StageCost], num_microbatches: int
    ) -> list[float]:
        """Return each device's bytes of parameters, gradients, optimizer state, and its reserve."""
        state: list[float] = [*self.machine.reserve.on(placement, costs, num_microbatches)]
        for devices, cost in zip(placement, costs, strict=True):
            for device in devices:
                state[device] += state_bytes(cost, self.machine.state_factor)
        return state


class _Way(NamedTuple):
    """How to recompute, and whether the cut assumes full recomputation and obeys the memory cap."""

    recompute: str
    recomputing: bool
    capped: bool


_LESS_MEMORY = (
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
    reason = f"its fastest cut takes at least {bound:.4g} s, and another plan {best:.4g} s"
    return Rejected(what=what, reason=reason, bound_seconds=bound)
