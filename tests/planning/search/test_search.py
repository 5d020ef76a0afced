"""The search: no slower than any plan that a user would make by name, within the cap, explained."""

import random
from dataclasses import replace

import pytest

from stagewise.costs import CellCost, LinkCost
from stagewise.errors import BatchError, PlanError, ScheduleError
from stagewise.planning import Plan, plan_from_costs, search
from stagewise.planning.request import SEGMENTS
from stagewise.planning.search.search import CostsAt, SearchResult
from stagewise.schedule import POLICIES, SCHEDULES

LINK = LinkCost(latency_seconds=1e-4, seconds_per_byte=1e-9)


def model(num_cells: int, *, fixed: float = 0.01, seed: int | None = None) -> CostsAt:
    """Costs of a minibatch of 32 parts: each costs its share, and `fixed` of a second besides."""
    rng = random.Random(seed)
    weights = [1.0 if seed is None else rng.uniform(0.2, 2) for _ in range(num_cells)]

    def costs_at(num_microbatches: int) -> list[CellCost]:
        share = 32 / num_microbatches
        return [
            CellCost(
                name=f"cell {index}",
                forward_seconds=weight * share + fixed,
                backward_seconds=2 * (weight * share + fixed),
                input_seconds=weight * share + fixed,
                weight_seconds=weight * share + fixed,
                parameter_bytes=1000,
                activation_bytes=int(8000 * weight * share),
                output_bytes=int(1000 * share),
                gradient_bytes=int(1000 * share),
                deferred_bytes=int(4000 * weight * share),
            )
            for index, weight in enumerate(weights)
        ]

    return costs_at


def device_bytes(plan: Plan, state_factor: float = 4) -> list[float]:
    peaks, schedule = plan.peak_activation_bytes, plan.built_schedule
    return [
        peaks[device]
        + state_factor
        * sum(plan.engine_costs[stage].parameter_bytes for stage in schedule.stages_of(device))
        for device in range(plan.num_devices)
    ]


def assert_holds(result: SearchResult) -> None:
    """What the result says of the chosen plan is what the plan itself says."""
    plan = result.plan
    assert plan.timeline.duration_seconds == pytest.approx(result.chosen.seconds, rel=1e-12)
    assert list(result.chosen.device_bytes) == pytest.approx(device_bytes(plan), abs=1)
    assert result.memory_bytes is None or max(device_bytes(plan)) <= result.memory_bytes + 1
    assert result.bound_seconds <= result.chosen.seconds
    assert result.schedule_bound_seconds <= result.chosen.seconds * (1 + 1e-9)
    assert Plan.from_json(plan.to_json()) == plan
    for other in result.runners_up:
        assert other.seconds >= result.chosen.seconds


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("cap", [None, 700_000, 165_000])
def test_no_plan_by_name_is_faster(seed: int | None, cap: float | None) -> None:
    costs_at, counts = model(12, seed=seed), (2, 4, 8)
    result = search(costs_at, 3, num_microbatches=counts, memory_bytes=cap, link=LINK)
    assert_holds(result)
    assert result.plan.num_microbatches in counts
    num_fitting = 0
    for name in SCHEDULES:
        for count in counts:
            for recompute in POLICIES:
                plan = plan_from_costs(
                    costs_at(count),
                    num_devices=3,
                    num_microbatches=count,
                    schedule=name,
                    recompute=recompute,
                    link=LINK,
                )
                if cap is None or max(device_bytes(plan)) <= cap:
                    num_fitting += 1
                    assert result.chosen.seconds <= plan.timeline.duration_seconds * (1 + 1e-9)
    assert num_fitting >= (2 if cap == 165_000 else 10)


def test_recomputes_only_where_memory_wants_it() -> None:
    free = search(model(12), 3, num_microbatches=[8], link=LINK)
    assert free.chosen.recompute == "never" and not free.plan.segments
    most = max(free.chosen.device_bytes)
    tight = search(model(12), 3, num_microbatches=[8], link=LINK, memory_bytes=0.25 * most)
    assert_holds(tight)
    assert tight.chosen.seconds > free.chosen.seconds
    always = search(
        model(12),
        3,
        num_microbatches=[8],
        link=LINK,
        memory_bytes=0.25 * most,
        recompute="always",
        synthesis=False,
    )
    assert tight.chosen.seconds <= always.chosen.seconds


def test_segments_spare_less_than_all() -> None:
    """1F1B under a cap at which recomputing everything is not needed."""
    arguments = {"num_microbatches": [8], "schedules": ["1f1b"], "synthesis": False}
    never = search(model(12), 3, recompute="never", **arguments)  # type: ignore[arg-type]
    cap = 0.7 * max(never.chosen.device_bytes)
    found = {
        policy: search(model(12), 3, recompute=policy, memory_bytes=cap, **arguments)  # type: ignore[arg-type]
        for policy in (SEGMENTS, "always", "auto")
    }
    for result in found.values():
        assert_holds(result)
    assert found[SEGMENTS].plan.segments
    assert never.chosen.seconds < found[SEGMENTS].chosen.seconds < found["always"].chosen.seconds
    assert found["auto"].chosen.seconds <= found[SEGMENTS].chosen.seconds


def test_the_number_of_microbatches_is_weighed() -> None:
    """Many fill the pipeline, but each costs its fixed part again."""
    chosen = [
        search(model(8, fixed=fixed), 4, num_microbatches=[2, 8, 32]).plan.num_microbatches
        for fixed in (0.0, 1.0, 30.0)
    ]
    assert chosen == [32, 8, 2]


def test_stages_on_several_devices() -> None:
    """DESIGN.md: with eight unequal layers replicas nearly double what one device each allows."""

    def costs_at(num_microbatches: int) -> list[CellCost]:
        return [
            CellCost(
                name=str(s), forward_seconds=s / 3, backward_seconds=2 * s / 3, parameter_bytes=9
            )
            for s in (50, 200, 80, 300, 60, 150, 90, 250)
        ]

    apart = search(costs_at, 8, num_microbatches=[32])
    shared = search(costs_at, 8, num_microbatches=[32], replicas=True)
    assert 32 * 1180 / apart.chosen.seconds < 3.94
    assert 32 * 1180 / shared.chosen.seconds > 7
    assert shared.plan.replicas and sum(shared.plan.replicas) <= 8
    assert shared.plan.timeline.duration_seconds == pytest.approx(shared.chosen.seconds)
    # Summing gradients over a slow link is not worth it.
    slow = LinkCost(seconds_per_byte=1e4)
    assert not search(costs_at, 8, num_microbatches=[32], replicas=True, link=slow).plan.replicas


def test_nothing_fits() -> None:
    with pytest.raises(PlanError, match=r"no plan for 6 cells on 2 devices fits; use more") as e:
        search(model(6), 2, num_microbatches=[2], memory_bytes=5_000)
    assert ", 2 microbatches, 2 stages per device: device 1 needs " in str(
        e.value
    ) and "of 4.88 KiB" in str(e.value)


def test_what_was_rejected_says_why() -> None:
    result = search(model(12), 3, num_microbatches=[2, 8], memory_bytes=400_000, link=LINK)
    reasons = [str(rejected) for rejected in result.rejected]
    assert any("takes at least" in reason for reason in reasons)
    assert any("KiB of 391 KiB" in reason for reason in reasons)
    assert len({*reasons}) == len(reasons)


@pytest.mark.parametrize("cap", [None, 12e5])
def test_hundred_cells_on_eight_devices_take_little_work(cap: float | None) -> None:
    """Seconds on any machine: work is counted, not timed."""
    seen: list[tuple[int, int]] = []
    result = search(
        model(100, seed=3),
        8,
        num_microbatches=[8, 16, 32],
        memory_bytes=cap,
        link=LINK,
        progress=lambda done, total, what: seen.append((done, total)),
    )
    assert_holds(result)
    assert result.work.partitions <= 100
    assert result.work.simulations <= 200
    assert result.work.instructions <= 400_000
    assert seen[0][0] == 0 and all(done <= total for done, total in seen)


def test_effort_is_bounded_and_told() -> None:
    result = search(model(24), 4, num_microbatches=[4, 64], max_instructions=4_000, synthesis=False)
    assert result.work.instructions <= 4_000 * 1.5  # an option may have W's besides
    assert any(
        "exceed the search's limit of 4,000" in str(rejected) for rejected in result.rejected
    )


def test_the_same_every_time() -> None:
    once, again = (
        search(model(16, seed=5), 4, num_microbatches=[4, 8], memory_bytes=600_000)
        for _ in range(2)
    )
    assert replace(once.chosen) == replace(again.chosen)
    assert once.plan.to_json() == again.plan.to_json()


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(PlanError, match="num_devices is 0"):
        search(model(4), 0, num_microbatches=[1])
    with pytest.raises(PlanError, match=r"num_microbatches is \[\]"):
        search(model(4), 1, num_microbatches=[])
    with pytest.raises(PlanError, match="recompute is 'maybe'; choose 'auto', 'segments'"):
        search(model(4), 1, num_microbatches=[1], recompute="maybe")
    with pytest.raises(ScheduleError, match="there is no schedule 'zigzag'"):
        search(model(4), 1, num_microbatches=[1], schedules=["zigzag"])


@pytest.mark.parametrize(
    ("seed", "tried"), [(None, "breadth_first"), (1, "dualpipe_v"), (3, "breadth_first")]
)
def test_of_named_plans_that_are_alike_the_one_that_changes_stages_least_is_tried(
    seed: int | None, tried: str
) -> None:
    found = search(model(16, seed=seed), 2, num_microbatches=[8], link=LINK)
    named = [
        plan for plan in found.finalists if not plan.programs and plan.option.stages_per_device > 1
    ]
    assert [plan.option.schedule for plan in named] == [tried]


def test_numbers_of_microbatches_that_the_batch_does_not_allow_are_left_out() -> None:
    def costs_at(count: int) -> list[CellCost]:
        if count > 4:
            raise BatchError("a microbatch of one sample")
        return [*model(8)(count)]

    found = search(costs_at, 2, num_microbatches=[2, 4, 8], link=LINK)
    assert {plan.num_microbatches for plan in (found.chosen, *found.runners_up)} <= {2, 4}
    assert "8 microbatches: a microbatch of one sample" in map(str, found.rejected)
    with pytest.raises(BatchError, match="one sample"):
        search(costs_at, 2, num_microbatches=[8, 16], link=LINK)
