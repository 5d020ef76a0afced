"""When costs have drifted, and which plan is then worth a change: functions of numbers."""

from collections.abc import Callable
from dataclasses import replace

from stagewise.costs import CellCost, InstructionCost
from stagewise.planning.calibrate import EngineOverhead, with_engine_overhead
from stagewise.planning.drift import drift_of, faster_plan, stage_factors
from stagewise.planning.plan import Plan
from stagewise.planning.simulate import simulate
from stagewise.timeline import Timeline


def cells(*seconds: float) -> tuple[CellCost, ...]:
    return tuple(
        CellCost(name=str(i), forward_seconds=s, backward_seconds=2 * s)
        for i, s in enumerate(seconds)
    )


PLAN = Plan(balance=(2, 2), schedule="1f1b", num_microbatches=4, cells=cells(1, 1, 1, 1))


def measured(plan: Plan, *factors: float) -> Timeline:
    """What is measured where stages take `factors` times the planned seconds."""
    costs = [
        replace(
            cost,
            forward_seconds=cost.forward_seconds * factor,
            backward_seconds=cost.backward_seconds * factor,
            recompute_seconds=cost.recompute_seconds * factor,
        )
        for cost, factor in zip(plan.engine_costs, factors, strict=True)
    ]
    return simulate(plan.built_schedule, costs)


def test_factors_of_stages() -> None:
    assert stage_factors(PLAN, measured(PLAN, 1, 1.5)) == (1, 1.5)
    always = replace(PLAN, recompute="always")
    assert stage_factors(always, measured(always, 0.5, 2)) == (0.5, 2)


def test_nothing_drifts_on_a_steady_run() -> None:
    assert drift_of(PLAN, [measured(PLAN, 1, 1)] * 10) is None
    assert drift_of(PLAN, [measured(PLAN, 1.19, 0.85)] * 10) is None, "within the threshold"


def test_several_looks_must_agree() -> None:
    slow, usual = measured(PLAN, 1, 2), measured(PLAN, 1, 1)
    assert drift_of(PLAN, [slow, slow]) is None, "too few"
    assert drift_of(PLAN, [slow, usual, slow]) is None, "one was as planned"
    assert drift_of(PLAN, [measured(PLAN, 1, 2), measured(PLAN, 1, 0.5), slow]) is None
    drift = drift_of(PLAN, [usual, slow, slow, slow])
    assert drift is not None and drift.factors == (1, 2)
    assert str(drift) == "the stages take 1.00, 2.00 times the planned seconds"
    assert [cell.forward_seconds for cell in drift.plan.cells] == [1, 1, 2, 2]
    assert drift_of(drift.plan, [slow] * 3) is None, "it is what the plan says now"


def test_what_instructions_take_beyond_their_cells_drifts_with_them() -> None:
    overhead = InstructionCost(forward_seconds=0.5, backward_seconds=0.25)
    plan = replace(PLAN, cells=with_engine_overhead(PLAN.cells, EngineOverhead(per_stage=overhead)))
    drift = drift_of(plan, [measured(plan, 1, 2)] * 3)
    assert drift is not None and drift.factors == (1, 2)
    assert stage_factors(drift.plan, measured(plan, 1, 2)) == (1, 1)


def test_longer_sequences_are_a_drift_of_all_stages() -> None:
    drift = drift_of(PLAN, [measured(PLAN, 1.5, 1.5)] * 3)
    assert drift is not None and drift.factors == (1.5, 1.5)
    faster_ones = drift_of(PLAN, [measured(PLAN, 0.5, 1)] * 3)
    assert faster_ones is not None and faster_ones.factors == (0.5, 1)


def test_a_slow_stage_gives_cells_away() -> None:
    drift = drift_of(PLAN, [measured(PLAN, 1, 3)] * 3)
    assert drift is not None
    assert faster_plan(drift.plan, {}) is None, "no schedule helps the slow stage"
    change = faster_plan(drift.plan, {}, may_move=True)
    assert change is not None and change.moves and change.plan.balance == (3, 1)
    now, then = drift.plan.timeline.duration_seconds, change.plan.timeline.duration_seconds
    assert change.gain == 1 - then / now > 0.1


def test_microbatches_only_as_they_were_measured() -> None:
    small: Callable[[float], tuple[CellCost, ...]] = lambda s: cells(s, s, s, s)  # noqa: E731
    assert faster_plan(PLAN, {4: small(1)}) is None
    change = faster_plan(PLAN, {8: small(0.5)})
    assert change is not None and change.plan.num_microbatches == 8 and not change.moves
    assert change.plan.cells == small(0.5)
    assert faster_plan(PLAN, {8: small(0.58)}) is None, "an overhead eats the gain"
    assert faster_plan(PLAN, {2: small(1)}, least_microbatches=3) is None
    assert faster_plan(PLAN, {2: small(1)}) is not None


def test_plans_that_cannot_be_changed() -> None:
    own = Plan(
        balance=(1,), schedule="mine", programs=("0F0 0B0",), num_microbatches=1, cells=cells(1)
    )
    assert faster_plan(own, {2: cells(0.1)}) is None
