import random
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.synthesis import Case, best_named_seconds, random_case
from stagewise.costs import CellCost, StageCost, stage_costs
from stagewise.errors import PlanError
from stagewise.planning import Plan, lower_bound_seconds, simulate, synthesise, unit_costs
from stagewise.planning.synthesis.problem import NEVER, Problem
from stagewise.planning.synthesis.synthesise import best_solution, named_schedules
from stagewise.schedule import SCHEDULES, Kind, Schedule, named_schedule, validate
from tests.planning.problems import least_seconds, tiny_problems

EFFORT = 100_000  # a fortieth of the default: the promises do not depend on it


def synthesised(case: Case, effort: int = EFFORT) -> Schedule:
    return synthesise(
        case.placement,
        case.costs,
        case.num_microbatches,
        case.link,
        memory_bytes=case.memory_bytes,
        recompute=case.recompute,
        split=case.split,
        effort=effort,
    )


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 20))
def test_promises_on_any_costs(seed: int) -> None:
    case = random_case(random.Random(seed))
    schedule = validate(synthesised(case))
    assert schedule.placement == case.placement
    assert schedule.num_microbatches == case.num_microbatches
    kinds = {i.kind for _, i in schedule.instructions()}
    assert case.split or kinds.isdisjoint({Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})
    assert (Kind.RECOMPUTE in kinds) <= (case.recompute != "never")

    timeline = simulate(schedule, case.costs, case.link)
    if case.memory_bytes is not None:
        peaks = timeline.peak_activation_bytes(case.costs)
        assert all(peak <= cap for peak, cap in zip(peaks, case.memory_bytes, strict=True))
    named = best_named_seconds(case)
    assert named is None or timeline.duration_seconds <= named
    bound = lower_bound_seconds(
        case.placement,
        case.costs,
        case.num_microbatches,
        case.link,
        memory_bytes=case.memory_bytes,
        recompute=case.recompute,
        split=case.split,
    )
    assert bound.distance(timeline.duration_seconds) > -1e-12


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_named_schedule_takes_part_for_its_placement(name: str) -> None:
    schedule = named_schedule(name, 4, 8)
    assert schedule in list(named_schedules(schedule.placement, 8))


@settings(max_examples=60)
@given(problem=tiny_problems())
def test_close_to_the_optimum_of_all_schedules(problem: Problem) -> None:
    least = least_seconds(problem)
    assume(least < NEVER)
    assert least <= best_solution(problem, EFFORT).seconds <= 1.1 * least


def test_reproducible() -> None:
    case = random_case(random.Random(7))
    assert synthesised(case) == synthesised(case)


def test_more_effort_is_no_slower() -> None:
    case = random_case(random.Random(12))
    seconds = [
        simulate(synthesised(case, effort), case.costs, case.link).duration_seconds
        for effort in (0, EFFORT, 10 * EFFORT)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_zero_bubble_on_equal_stages() -> None:
    """With split backwards and memory only the fill is left: the last device waits K-1 forwards."""
    costs = [replace(cost, backward_seconds=2) for cost in unit_costs(4)]
    schedule = synthesise([(device,) for device in range(4)], costs, 8)
    assert simulate(schedule, costs).duration_seconds == 8 * 3 + 3


def test_one_heavy_stage_is_never_starved() -> None:
    """Half as fast as the others, device 2 is busy from its first input to its last gradient."""
    light = StageCost(forward_seconds=1, backward_seconds=2, recompute_seconds=1)
    heavy = StageCost(forward_seconds=2, backward_seconds=4, recompute_seconds=2)
    costs = [light, light, heavy, light]
    schedule = synthesise([(device,) for device in range(4)], costs, 12, split=False)
    assert simulate(schedule, costs).duration_seconds == 12 * 6 + 2 * (1 + 2)


def test_plans_carry_it() -> None:
    cells = [
        CellCost(name=str(i), forward_seconds=i + 1, backward_seconds=2 * i + 2) for i in range(4)
    ]
    balance = (1, 1, 1, 1)
    schedule = synthesise(
        ((0,), (1,), (1,), (0,)), stage_costs(cells, balance), 4, recompute="always"
    )
    plan = Plan(
        balance=balance,
        schedule="auto",
        num_microbatches=4,
        programs=tuple(str(schedule).splitlines()),
        cells=tuple(cells),
    )
    assert Plan.from_json(plan.to_json()).built_schedule == schedule


def test_a_cap_that_holds_no_microbatch_names_the_device() -> None:
    costs = [
        StageCost(
            forward_seconds=1,
            backward_seconds=1,
            recompute_seconds=1,
            input_bytes=2,
            activation_bytes=10 * (stage + 1),
        )
        for stage in range(4)
    ]
    placement = ((0,), (1,), (1,), (0,))
    with pytest.raises(PlanError, match=r"device 0 may keep 53 bytes .* needs 54 on its stages"):
        synthesise(placement, costs, 4, memory_bytes=53)
    schedule = synthesise(placement, costs, 4, memory_bytes=54)
    assert max(simulate(schedule, costs).peak_activation_bytes(costs)) <= 54
    # Recomputation keeps the inputs of both stages and the larger graph.
    with pytest.raises(PlanError, match=r"device 0 may keep 43 bytes .* needs 44"):
        synthesise(placement, costs, 4, memory_bytes=43, recompute="always")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": unit_costs(3)}, "costs of 3 stages for a placement of 2"),
        ({"placement": ((0,), ())}, "must name the devices of"),
        ({"num_microbatches": 0}, "needs at least 1"),
        ({"recompute": "often"}, "there is no recompute policy 'often'"),
        ({"memory_bytes": [1, 2, 3]}, "memory caps of 3 devices for a placement on 2"),
    ],
)
def test_what_cannot_be_right(arguments: dict[str, object], message: str) -> None:
    given = {"placement": ((0,), (1,)), "costs": unit_costs(2), "num_microbatches": 2}
    with pytest.raises(PlanError, match=message):
        synthesise(**{**given, **arguments})  # type: ignore[arg-type]


def test_blocked_is_not_a_result() -> None:
    case = random_case(random.Random(3))
    assert simulate(synthesised(case), case.costs, case.link).duration_seconds < NEVER


def test_stages_that_take_no_time_get_their_microbatches() -> None:
    """Little's law gave them none in flight, and list scheduling was deadlocked."""
    free = StageCost(forward_seconds=0, backward_seconds=0, recompute_seconds=0)
    costs = [free] * 8
    costs[5] = replace(free, backward_seconds=1e-5, input_seconds=6e-4)
    costs[6] = replace(free, forward_seconds=4e-6, weight_seconds=0.011)
    schedule = synthesise([(stage % 2,) for stage in range(8)], costs, 4, effort=100_000)
    validate(schedule)
