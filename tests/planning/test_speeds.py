"""Devices that are not equally fast: cuts, simulated times and searches follow."""

import itertools
from fractions import Fraction

import pytest

from stagewise.costs import CellCost, LinkCost
from stagewise.errors import PlanError
from stagewise.planning import Plan, plan_from_costs, search
from stagewise.planning.partition.place import place
from stagewise.planning.request import PlanRequest


def cells(seconds: list[float], parameter_bytes: int = 0) -> tuple[CellCost, ...]:
    return tuple(
        CellCost(
            name=str(index),
            forward_seconds=each,
            backward_seconds=2 * each,
            parameter_bytes=parameter_bytes,
            output_bytes=1,
        )
        for index, each in enumerate(seconds)
    )


def test_the_cut_gives_each_device_what_it_can_do() -> None:
    plan = plan_from_costs(cells([1] * 12), num_stages=2, num_microbatches=8, speeds=(1, 0.5))
    assert (plan.balance, plan.speeds) == ((8, 4), (1.0, 0.5))
    assert plan.timeline.busy_seconds == (8 * 24, 8 * 24)
    equal = plan_from_costs(cells([1] * 12), num_stages=2, num_microbatches=8, speeds=(2, 2))
    assert (equal.balance, equal.speeds) == ((6, 6), ())
    other_way = plan_from_costs(cells([1] * 12), num_stages=2, num_microbatches=8, speeds=(1, 2))
    assert (other_way.balance, other_way.speeds) == ((4, 8), (0.5, 1.0))
    assert Plan.from_json(plan.to_json()) == plan
    assert "devices of speeds 1, 0.5" in str(plan)


def test_a_blind_cut_takes_longer_by_the_slow_device() -> None:
    plan = plan_from_costs(cells([1] * 12), num_stages=2, num_microbatches=8, speeds=(1, 0.5))
    blind = plan_from_costs(cells([1] * 12), num_stages=2, num_microbatches=8, balance=(6, 6))
    there = Plan(balance=blind.balance, num_microbatches=8, cells=blind.cells, speeds=plan.speeds)
    assert there.timeline.duration_seconds == 18 + 8 * 36
    assert plan.timeline.duration_seconds == 9 * 24


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
@pytest.mark.parametrize("speeds", [(1.0, 0.5), (0.25, 1.0)])
def test_the_best_of_all_cuts_is_found(schedule: str, speeds: tuple[float, float]) -> None:
    seconds = [3.0, 1, 4, 1, 5, 9, 2, 6]
    placements = {"1f1b": [(0,), (1,)], "interleaved": [(0,), (1,), (0,), (1,)]}
    placement = placements.get(schedule, [(0,), (1,), (1,), (0,)])
    found = place(placement, seconds, speeds=speeds)
    assert found is not None

    def busiest(cuts: tuple[int, ...]) -> Fraction:
        loads = [Fraction(0), Fraction(0)]
        for (device,), start, end in zip(placement, cuts, cuts[1:], strict=False):
            loads[device] += Fraction(sum(seconds[start:end])) / Fraction(speeds[device])
        return max(loads)

    inner = itertools.combinations(range(1, 8), len(placement) - 1)
    assert found.seconds == pytest.approx(float(min(busiest((0, *c, 8)) for c in inner)), rel=1e-9)
    assert found.bound_seconds <= found.seconds * (1 + 1e-12)


def test_the_search_weighs_speeds_and_memory() -> None:
    costs = cells([1] * 12, parameter_bytes=10)
    free = search(lambda count: costs, 2, num_microbatches=[8], speeds=(1, 0.5))
    assert free.plan.speeds == (1.0, 0.5)
    assert free.bound_seconds <= free.chosen.seconds
    named = [
        plan_from_costs(costs, num_stages=2, num_microbatches=8, schedule=name, speeds=(1, 0.5))
        for name in ("gpipe", "1f1b", "zb_h1")
    ]
    assert free.chosen.seconds <= min(p.timeline.duration_seconds for p in named) * (1 + 1e-9)
    assert free.chosen.seconds == pytest.approx(free.plan.timeline.duration_seconds)
    tight = search(
        lambda count: costs,
        2,
        num_microbatches=[8],
        schedules=["1f1b"],
        speeds=(1, 0.5),
        memory_bytes=(6 * 40, 8 * 40),
    )
    assert tight.plan.balance == (6, 6)


@pytest.mark.parametrize("speeds", [(1,), (1, 1, 1), (2, 1, 1)])
def test_speeds_are_as_many_as_devices(speeds: tuple[float, ...]) -> None:
    """Also equal ones, which change nothing."""
    with pytest.raises(PlanError, match=f"speeds has {len(speeds)} numbers for 2 devices"):
        plan_from_costs(cells([1] * 4), num_devices=2, num_microbatches=2, speeds=speeds)
    with pytest.raises(PlanError, match="speeds has 1 numbers for 3 devices"):
        plan_from_costs(cells([1] * 4), num_stages=3, num_microbatches=2, speeds=(1,))


@pytest.mark.parametrize("speeds", [(1, 0), (1, -1), ("fast", 1), "quick", (1, True), 2, ()])
def test_what_is_no_speed_is_refused(speeds: object) -> None:
    def made() -> PlanRequest:
        return PlanRequest(num_devices=2, num_microbatches=2, speeds=speeds)  # type: ignore[arg-type]

    if speeds == ():
        assert made().known_speeds == ()
        return
    with pytest.raises(PlanError, match="speeds is"):
        made()


def test_numbers_of_speeds_and_replicas_are_checked() -> None:
    with pytest.raises(PlanError, match="speeds has 3 numbers for 2 devices; give one for each"):
        PlanRequest(num_devices=2, num_microbatches=2, speeds=(1, 2, 3))
    with pytest.raises(PlanError, match="speeds has 2 numbers for 3 devices"):
        plan_from_costs(cells([1] * 4), num_stages=3, num_microbatches=2, speeds=(1, 2))
    with pytest.raises(PlanError, match="must be equally fast"):
        PlanRequest(replicas=(1, 2), num_microbatches=2, speeds=(1, 2, 3))
    with pytest.raises(PlanError, match="this is not a plan"):
        Plan.from_json(
            plan_from_costs(cells([1] * 2), num_stages=2, num_microbatches=2, speeds=(1, 0.5))
            .to_json()
            .replace("0.5", "0")
        )


def test_transfers_are_not_slower_on_a_slow_device() -> None:
    link = LinkCost(latency_seconds=1)
    found = place([(0,), (1,)], [1.0, 1, 1], transfer_seconds=[1, 1], speeds=(1, 0.5))
    assert found is not None and (found.balance, found.seconds) == ((2, 1), 3)
    assert link.transfer_seconds(0) == 1
