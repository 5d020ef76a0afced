"""Detect that a run's costs differ from those its plan was made from, and find a better plan.

Problem: a device slows down under other load, or sequences get longer, and the plan is no longer
the best; but a single slow step means nothing, and changing the plan costs time.
Idea: several consecutive measured timelines must all show a stage that is slower, or faster, than
planned. Then the planned costs are scaled by the measurements, and other numbers of microbatches,
schedules of the same placement and other cuts are simulated. Everything is a pure function of
plans and timelines.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from stagewise.costs import CellCost, InstructionCost, scaled
from stagewise.errors import UsageError
from stagewise.planning.partition.place import best_balance
from stagewise.planning.partition.speeds import relative_speeds
from stagewise.planning.plan import Plan
from stagewise.planning.refit import with_microbatches
from stagewise.schedule import SCHEDULES, Kind
from stagewise.schedule.instruction import KINDS
from stagewise.timeline import Timeline

NUM_LOOKS = 3  # consecutive timelines that must agree
DRIFT = 0.2  # smallest relative deviation of a stage from the plan
GAIN, GAIN_OF_MOVING = 0.05, 0.1  # smallest relative gain worth a change, without and with moves


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Costs that have changed: the plan with the new ones, and each engine stage's factor."""

    plan: Plan  # with the costs measured now
    factors: tuple[float, ...]  # measured over planned

    def scaled(self, cells: Sequence[CellCost]) -> tuple[CellCost, ...]:
        """Return `cells` (for another number of microbatches) scaled by their stages' factors."""
        return _scaled(cells, self.plan.engine_balance, self.factors)

    def __str__(self) -> str:
        listing = ", ".join(f"{factor:.2f}" for factor in self.factors)
        return f"the stages take {listing} times the planned seconds"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A faster plan; `gain` is the fraction of a step's predicted time that it saves."""

    plan: Plan
    gain: float
    moves: bool  # whether cells move to other stages


def stage_factors(plan: Plan, timeline: Timeline) -> tuple[float, ...]:
    """Return, per engine stage, the measured seconds (a sum of medians per kind) over planned.

    Without what a plan does not price: the gathers of shards.
    """
    times: dict[tuple[int, Kind], list[float]] = {}
    for span in timeline.spans:
        place = span.instruction.stage, span.instruction.kind
        times.setdefault(place, []).append(span.seconds)
    factors = []
    for stage, cost in enumerate(plan.engine_costs):
        kinds = [k for k in KINDS if (stage, k) in times and not KINDS[k].of_shards]
        planned = sum(KINDS[kind].seconds_on(cost) for kind in kinds)
        measured = sum(statistics.median(times[stage, kind]) for kind in kinds)
        factors.append(measured / planned if planned else 1.0)
    return tuple(factors)


def drift_of(plan: Plan, looks: Sequence[Timeline]) -> Drift | None:
    """Return the drift that all of the last NUM_LOOKS `looks` show, or None.

    All must show the same stage above 1 + DRIFT times its planned seconds, or all below
    1 / (1 + DRIFT).
    """
    if len(looks) < NUM_LOOKS:
        return None
    by_stage = list(zip(*(stage_factors(plan, look) for look in looks[-NUM_LOOKS:]), strict=True))
    if not any(min(f) > 1 + DRIFT or max(f) < 1 / (1 + DRIFT) for f in by_stage):
        return None
    factors = tuple(map(statistics.median, by_stage))
    cells = _scaled(plan.cells, plan.engine_balance, factors)
    return Drift(plan=replace(plan, cells=cells), factors=factors)


def at_speeds(plan: Plan, speeds: Sequence[float]) -> Plan:
    """Return `plan` with what its cells would cost on devices of these speeds.

    Those of the plan's own devices have the same scale: 1 is that of the device that was priced.
    """
    cells = tuple(_scaled_cell(cell, 1 / max(speeds)) for cell in plan.cells)
    relative = relative_speeds([*speeds])
    return replace(plan, cells=cells, speeds=relative, measured_seconds=None, machine="")


def faster_plan(
    plan: Plan,
    measured: Mapping[int, Sequence[CellCost]],
    *,
    may_move: bool = False,
    least_microbatches: int = 1,
) -> Change | None:
    """Return the fastest plan near `plan`, if it is worth the change.

    Args:
        plan: the running plan, with current costs.
        measured: cell costs for other numbers of microbatches; only these are tried, because the
            time of a smaller microbatch cannot be derived from a larger one.
        may_move: whether cells may move to other stages.
        least_microbatches: fewer are not tried (they ran out of memory).
    """
    now = plan.timeline.duration_seconds
    best: Change | None = None
    for other in _neighbours(plan, measured, may_move=may_move):
        if other.num_microbatches < least_microbatches:
            continue
        moves = other.balance != plan.balance
        gain = 1 - other.timeline.duration_seconds / now if now else 0.0
        worth = gain > (GAIN_OF_MOVING if moves else GAIN)
        if worth and (best is None or gain > best.gain):
            best = Change(plan=other, gain=gain, moves=moves)
    return best


def _neighbours(
    plan: Plan, measured: Mapping[int, Sequence[CellCost]], *, may_move: bool
) -> Iterator[Plan]:
    """Yield plans of the same placement: other microbatches, schedules, and cuts if `may_move`."""
    if plan.programs or (plan.segments and plan.recompute == "never"):
        return
    plan = replace(plan, segments=())  # recomputed blocks are chosen afterwards
    placement = plan.built_schedule.placement
    for count, cells in {**measured, plan.num_microbatches: plan.cells}.items():
        try:
            same = replace(with_microbatches(plan, count), cells=tuple(cells))
        except UsageError:  # the schedule may not suit this number
            continue
        for name in sorted(SCHEDULES, key=lambda name: name != plan.schedule):
            if SCHEDULES[name].splits_backward and name != plan.schedule:
                continue  # its instructions were not measured
            with suppress(UsageError):
                other = replace(same, schedule=name)
                needs_more = max(other.peak_activation_bytes) > max(same.peak_activation_bytes)
                if other.built_schedule.placement == placement and not needs_more:
                    yield other
                if may_move:
                    balance = best_balance(
                        other.built_schedule,
                        other.cells,
                        recompute=other.recompute,
                        link=other.link,
                        speeds=other.speeds,
                    )
                    yield replace(other, balance=balance)


def _scaled(
    cells: Sequence[CellCost], balance: Sequence[int], factors: Sequence[float]
) -> tuple[CellCost, ...]:
    of_cell = [f for f, size in zip(factors, balance, strict=True) for _ in range(size)]
    return tuple(_scaled_cell(cell, factor) for cell, factor in zip(cells, of_cell, strict=True))


def _scaled_cell(cell: CellCost, factor: float) -> CellCost:
    """Return `cell` with all its seconds, including instruction overhead, times `factor`."""
    own = vars(cell.instruction_overhead).items()
    overhead = InstructionCost(**{name: seconds * factor for name, seconds in own})
    return replace(scaled(cell, seconds=factor), instruction_overhead=overhead)
