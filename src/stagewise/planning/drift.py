"""Whether a run still has the costs that its plan was made from, and what to do if not.

Problem: a device gets slower by other load, or sequences get longer, and the plan is no longer the
best; yet one slow step means nothing, and changing costs time.
Idea: several looks at measured timelines in turn must all show a stage that takes more, or less,
than planned. Then the planned costs are scaled by what was measured, and other microbatches,
schedules of the same placement and another cut are simulated. Everything here is a pure function
of plans and timelines.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from stagewise.costs import CellCost, InstructionCost, scaled
from stagewise.errors import UsageError
from stagewise.planning.plan import Plan, best_balance, with_microbatches
from stagewise.schedule import SCHEDULES, Kind
from stagewise.schedule.instruction import KINDS
from stagewise.timeline import Timeline

NUM_LOOKS = 3  # that must agree
DRIFT = 0.2  # the least difference of a stage's seconds to the planned ones
GAIN, GAIN_OF_MOVING = 0.05, 0.1  # the least share of a step's time to win; moving cells costs more


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Costs that are no longer those of `plan`: per stage of the engine, measured over planned."""

    plan: Plan  # as it runs, with the costs that were measured now
    factors: tuple[float, ...]

    def scaled(self, cells: Sequence[CellCost]) -> tuple[CellCost, ...]:
        """The cells' costs for another number of microbatches, each with its stage's factor."""
        return _scaled(cells, self.plan.engine_balance, self.factors)

    def __str__(self) -> str:
        listing = ", ".join(f"{factor:.2f}" for factor in self.factors)
        return f"the stages take {listing} times the planned seconds"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A faster plan; `gain` is the share of a step's predicted time that it wins."""

    plan: Plan
    gain: float
    moves: bool  # cells to other stages


def stage_factors(plan: Plan, timeline: Timeline) -> tuple[float, ...]:
    """Per stage of the engine: median seconds measured for each kind, summed, over the planned."""
    times: dict[tuple[int, Kind], list[float]] = {}
    for span in timeline.spans:
        place = span.instruction.stage, span.instruction.kind
        times.setdefault(place, []).append(span.seconds)
    factors = []
    for stage, cost in enumerate(plan.engine_costs):
        kinds = [kind for kind in KINDS if (stage, kind) in times]
        planned = sum(KINDS[kind].seconds_on(cost) for kind in kinds)
        measured = sum(statistics.median(times[stage, kind]) for kind in kinds)
        factors.append(measured / planned if planned else 1.0)
    return tuple(factors)


def drift_of(plan: Plan, looks: Sequence[Timeline]) -> Drift | None:
    """The drift that the last NUM_LOOKS of `looks` all show; None where there is none.

    All of them must show a stage above 1 + DRIFT times its planned seconds, or all one below
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


def faster(
    plan: Plan,
    measured: Mapping[int, Sequence[CellCost]],
    *,
    may_move: bool = False,
    least_microbatches: int = 1,
) -> Change | None:
    """The fastest plan near `plan`, if it is worth the change.

    Args:
        plan: with the costs of now.
        measured: the cells' costs for other numbers of microbatches; only these are tried, since
            what a smaller microbatch takes cannot be known from a larger one.
        may_move: whether cells may go to other stages.
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
    """Plans of the same placement: other microbatches, schedules, and cuts if they `may_move`."""
    if plan.programs or (plan.segments and plan.recompute == "never"):
        return
    plan = replace(plan, segments=())  # in which blocks the others recompute is seen afterwards
    placement = plan.built_schedule.placement
    for count, cells in {**measured, plan.num_microbatches: plan.cells}.items():
        try:
            same = replace(with_microbatches(plan, count), cells=tuple(cells))
        except UsageError:  # the schedule may not suit this number
            continue
        for name in sorted(SCHEDULES, key=lambda name: name != plan.schedule):
            if SCHEDULES[name].splits_backward and name != plan.schedule:
                continue  # what its instructions take was not measured
            with suppress(UsageError):
                other = replace(same, schedule=name)
                if other.built_schedule.placement != placement or _needs_more(other, same):
                    continue
                yield other
                if may_move:
                    balance = best_balance(
                        other.built_schedule,
                        other.cells,
                        recompute=other.recompute,
                        link=other.link,
                    )
                    yield replace(other, balance=balance)


def _needs_more(plan: Plan, than: Plan) -> bool:
    """Whether some device needs more memory."""
    return max(plan.peak_activation_bytes) > max(than.peak_activation_bytes)


def _scaled(
    cells: Sequence[CellCost], balance: Sequence[int], factors: Sequence[float]
) -> tuple[CellCost, ...]:
    of_cell = [f for f, size in zip(factors, balance, strict=True) for _ in range(size)]
    return tuple(_scaled_cell(cell, factor) for cell, factor in zip(cells, of_cell, strict=True))


def _scaled_cell(cell: CellCost, factor: float) -> CellCost:
    """`cell` with `factor` times the seconds, its instructions' overhead too."""
    own = vars(cell.instruction_overhead).items()
    overhead = InstructionCost(**{name: seconds * factor for name, seconds in own})
    return replace(scaled(cell, seconds=factor), instruction_overhead=overhead)
