"""Microbatches of unequal costs: each takes its share, and the order is the simulator's choice."""

import math
import random
from fractions import Fraction
from itertools import permutations
from typing import Any

import pytest

from stagewise.costs import CellCost, LinkCost, StageCost
from stagewise.errors import PlanError
from stagewise.planning import order_microbatches, plan_from_costs, simulate
from stagewise.planning.plan import Plan
from stagewise.schedule import SCHEDULES, Instruction, Kind, named_schedule


def plan_of(schedule: str, count: int) -> Plan:
    cells = [
        CellCost(name="cell", forward_seconds=w, backward_seconds=2 * w, output_bytes=10)
        for w in (1.0, 1.5, 0.5, 1.0)
    ]
    return plan_from_costs(
        cells,
        num_devices=2,
        num_microbatches=count,
        schedule=schedule,
        link=LinkCost(seconds_per_byte=0.01),
    )


def test_a_microbatch_takes_and_sends_its_share() -> None:
    one = StageCost(
        forward_seconds=Fraction(1),
        backward_seconds=Fraction(2),
        recompute_seconds=Fraction(1),
        output_bytes=10,
        gradient_bytes=10,
    )
    link = LinkCost(latency_seconds=Fraction(1, 2), seconds_per_byte=Fraction(1, 10))
    spans = simulate(
        named_schedule("gpipe", 2, 2), [one] * 2, link, shares=[Fraction(3), Fraction(1, 3)]
    ).spans
    start = {str(span.instruction): span.start_seconds for span in spans}
    assert start["0F1"] == 3 and start["1F0"] == 3 + Fraction(1, 2) + 3
    seconds = {span.instruction: span.seconds for span in spans}
    assert seconds[Instruction(1, Kind.BACKWARD, 0)] == 6
    assert seconds[Instruction(1, Kind.BACKWARD, 1)] == Fraction(2, 3)


@pytest.mark.parametrize("shares", [[1.0], [1.0, 2.0, 3.0], [1.0, -1.0]])
def test_shares_of_other_microbatches_are_refused(shares: list[float]) -> None:
    schedule = named_schedule("gpipe", 2, 2)
    one = StageCost(forward_seconds=1, backward_seconds=2, recompute_seconds=1)
    with pytest.raises(PlanError, match="for a schedule of 2 microbatches"):
        simulate(schedule, [one] * 2, shares=shares)


@pytest.mark.parametrize(
    "costs",
    [
        *([], [1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [0.0, 0.0]),
        *([1.0, math.inf], [1.0, math.nan], None, 5, "12", ["a", "b"]),
    ],
)
def test_costs_of_other_microbatches_have_no_order(costs: Any) -> None:
    with pytest.raises(PlanError, match="for a plan of 2; give each a number"):
        order_microbatches(plan_of("1f1b", 2), costs)


def seconds(plan: Plan, costs: list[float], order: tuple[int, ...] | list[int]) -> float:
    mean = sum(costs) / len(costs)
    shares = [costs[number] / mean for number in order]
    return simulate(
        plan.built_schedule, plan.engine_costs, plan.link, shares=shares
    ).duration_seconds


@pytest.mark.parametrize("name", sorted({"gpipe", "1f1b", "zb_h1", "interleaved"} & {*SCHEDULES}))
def test_the_order_is_nearly_the_best_of_all(name: str) -> None:
    dice, plan = random.Random(0), plan_of(name, 4)
    for _ in range(5):
        costs = [dice.uniform(0.2, 3) for _ in range(4)]
        every = [seconds(plan, costs, order) for order in permutations(range(4))]
        found = order_microbatches(plan, costs)
        assert sorted(found) == [0, 1, 2, 3]
        assert seconds(plan, costs, found) <= 1.02 * min(every)
        assert seconds(plan, costs, found) <= seconds(plan, costs, [0, 1, 2, 3])


def test_equal_microbatches_stay_in_order() -> None:
    assert order_microbatches(plan_of("1f1b", 8), [5.0] * 8) == [*range(8)]
