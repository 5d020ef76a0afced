from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stagewise.costs import LinkCost, StageCost
from stagewise.planning import lower_bound_seconds, simulate, unit_costs
from stagewise.planning.synthesis.lower_bound import bound_of, jackson
from stagewise.planning.synthesis.problem import NEVER, Problem
from stagewise.schedule import named_schedule
from tests.planning.problems import least_seconds, stages, tiny_problems

ROUNDING = 1e-9  # of the quotient bytes * seconds / cap; all other numbers are whole


@settings(max_examples=100)
@given(problem=tiny_problems())
def test_no_schedule_at_all_is_faster(problem: Problem) -> None:
    least = least_seconds(problem)
    assume(least < NEVER)
    assert bound_of(problem).seconds <= least + ROUNDING


@given(
    num_devices=st.integers(1, 8),
    num_microbatches=st.integers(1, 16),
    forward=st.integers(1, 9),
    backward=st.integers(1, 9),
)
def test_1f1b_on_equal_stages_is_at_the_bound(
    num_devices: int, num_microbatches: int, forward: int, backward: int
) -> None:
    costs = [
        StageCost(forward_seconds=forward, backward_seconds=backward, recompute_seconds=0)
    ] * num_devices
    schedule = named_schedule("1f1b", num_devices, num_microbatches)
    bound = lower_bound_seconds(schedule.placement, costs, num_microbatches, split=False)
    assert bound.seconds == simulate(schedule, costs).duration_seconds
    assert bound.distance(bound.seconds) == 0


@given(costs=stages(4), num_microbatches=st.integers(1, 6))
def test_the_busiest_device_with_its_fill_and_drain(
    costs: tuple[StageCost, ...], num_microbatches: int
) -> None:
    placement = [(device,) for device in range(4)]
    bound = lower_bound_seconds(placement, costs, num_microbatches, split=False)
    whole = [cost.forward_seconds + cost.backward_seconds for cost in costs]
    work = [num_microbatches * whole[d] + sum(whole[:d]) for d in range(4)]
    assert list(bound.work_seconds) == work
    assert bound.path_seconds == sum(whole)
    assert bound.seconds >= max(*work, sum(whole))


def test_one_microbatch_takes_its_critical_path() -> None:
    placement = ((0,), (1,), (1,), (0,))
    link = LinkCost(latency_seconds=3, overhead_seconds=1)
    bound = lower_bound_seconds(placement, unit_costs(4), 1, link, split=False)
    assert bound.path_seconds == bound.seconds == 8 + 4 * (3 + 1)


def test_room_for_one_microbatch_means_one_after_the_other() -> None:
    costs = [
        StageCost(forward_seconds=1, backward_seconds=2, recompute_seconds=0, activation_bytes=10)
    ] * 3
    bound = lower_bound_seconds(((0,), (1,), (2,)), costs, 5, memory_bytes=19, split=False)
    assert bound.seconds == 5 * 3 * (1 + 2)
    wide = lower_bound_seconds(((0,), (1,), (2,)), costs, 5, memory_bytes=30, split=False)
    assert wide.seconds == (5 + 2) * (1 + 2)


def test_exact_numbers_stay_exact() -> None:
    third = StageCost(
        forward_seconds=Fraction(1, 3),  # type: ignore[arg-type]
        backward_seconds=Fraction(2, 3),  # type: ignore[arg-type]
        recompute_seconds=0,
    )
    bound = lower_bound_seconds(((0,), (1,)), [third, third], 3, split=False)
    assert bound.seconds == Fraction(4)
    assert isinstance(bound.seconds, Fraction)


@pytest.mark.parametrize(
    ("tasks", "seconds"),
    [
        ([], 0),
        ([(0, 2, 5), (1, 3, 0)], 7),
        ([(0, 5, 0), (1, 1, 9)], 11),  # the second interrupts the first
        ([(4, 1, 0), (0, 1, 0)], 5),  # it stands still in between
        ([(0, 2, 1), (0, 2, 4), (3, 2, 4)], 9),
    ],
)
def test_the_longest_tail_goes_first(
    tasks: list[tuple[float, float, float]], seconds: float
) -> None:
    assert jackson(tasks) == seconds
