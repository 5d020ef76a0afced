"""The quick simulator is the simulator: equal to the last bit."""

import random
from dataclasses import replace
from itertools import product

import pytest

from stagewise.errors import ScheduleError
from stagewise.planning import simulate
from stagewise.planning.fast_simulate import held_microbatches, outcome_of
from stagewise.schedule import (
    POLICIES,
    SCHEDULES,
    Schedule,
    named_schedule,
    parse_programs,
    refine,
    schedule_of,
    with_recompute,
)
from tests.planning.costs import random_costs, random_link


def assert_equal(schedule: Schedule, rng: random.Random) -> None:
    costs = random_costs(rng, schedule.num_stages)
    unequal = [rng.uniform(0, 3) for _ in range(schedule.num_microbatches)]
    for link, shares in product((random_link(rng), random_link(rng)), ((), unequal)):
        timeline = simulate(schedule, costs, link, shares=shares)
        outcome = outcome_of(schedule, costs, link, shares=shares)
        assert outcome.seconds == timeline.duration_seconds
        assert outcome.busy_seconds == pytest.approx(timeline.busy_seconds, rel=1e-12)
        assert outcome.peak_bytes == timeline.peak_activation_bytes(costs)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_simulator(name: str, policy: str) -> None:
    rng = random.Random(name + policy)
    for num_devices, num_microbatches in ((1, 3), (2, 4), (3, 7), (4, 9)):
        plain = named_schedule(name, num_devices, num_microbatches)
        assert_equal(with_recompute(plain, policy), rng)


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_simulator_on_segments(name: str) -> None:
    rng = random.Random(name)
    plain = named_schedule(name, 3, 5)
    for _ in range(5):
        segments = tuple(
            tuple((1, rng.random() < 0.5) for _ in range(rng.randint(1, 3)))
            for _ in range(plain.num_stages)
        )
        assert_equal(refine(plain, segments), rng)


def test_microbatches_in_flight() -> None:
    assert held_microbatches(named_schedule("1f1b", 4, 8)) == (4, 3, 2, 1)
    assert held_microbatches(named_schedule("gpipe", 2, 8)) == (8, 8)
    assert held_microbatches(
        schedule_of("loop", parse_programs("0F0 1F0 0F1 1B0 1F1 1B1 0B0 0B1"))
    ) == (
        2,
        1,
    )


def test_a_blocked_schedule_is_told() -> None:
    blocked = replace(named_schedule("1f1b", 2, 2), programs=parse_programs("0B0 0F0\n1F0 1B0"))
    with pytest.raises(ScheduleError, match="deadlocks; validate"):
        outcome_of(blocked, random_costs(random.Random(0), 2))
