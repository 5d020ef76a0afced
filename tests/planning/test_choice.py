"""Which schedule is meant, and for how many stages and devices."""

from dataclasses import replace

import pytest

from stagewise.errors import PlanError, ScheduleError
from stagewise.planning import Plan, choose_schedule, plan_from_costs
from stagewise.schedule import SCHEDULES, Schedule, named_schedule, parse_programs
from tests.planning.test_plan import CELLS

MINE = named_schedule("interleaved", 2, 4, 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_name_stages_and_devices_follow_from_each_other(name: str) -> None:
    each = SCHEDULES[name].stages_per_device
    by_stages = choose_schedule(name, 5, num_stages=3 * each)
    assert by_stages == choose_schedule(name, 5, num_devices=3)
    assert by_stages == choose_schedule(name, 5, num_stages=3 * each, num_devices=3)
    assert by_stages.built == named_schedule(name, 3, 5)
    assert (by_stages.programs, by_stages.stages_per_device, by_stages.like) == ((), None, name)


def test_one_that_takes_any_number_of_stages_is_told_it_by_both() -> None:
    choice = choose_schedule("breadth_first", 5, num_stages=6, num_devices=2)
    assert choice.stages_per_device == 3
    assert choice.built == named_schedule("breadth_first", 2, 5, 3)


def test_ones_own_schedule_or_function() -> None:
    for mine in (MINE, lambda devices, m: named_schedule("interleaved", devices, m, 3)):
        choice = choose_schedule(mine, 4, num_devices=2)
        assert choice.built == choice.like == MINE
        assert (choice.name, choice.num_stages, choice.num_devices) == ("interleaved", 6, 2)
        assert choice.programs == tuple(str(MINE).splitlines())
    assert choose_schedule(MINE, 4).built == MINE


def test_replicas_say_stages_and_devices() -> None:
    choice = choose_schedule("1f1b", 5, replicas=(1, 2))
    assert choice == choose_schedule("1f1b", 5, num_stages=2, num_devices=3, replicas=[1, 2])
    assert choice.built == named_schedule("1f1b", 2, 5, replicas=(1, 2))
    assert (choice.replicas, choice.num_stages, choice.num_devices) == ((1, 2), 2, 3)
    for numbers in ({"num_stages": 3}, {"num_devices": 2}):
        with pytest.raises(PlanError, match=r"replicas \[1, 2\] imply"):
            choose_schedule("1f1b", 5, replicas=(1, 2), **numbers)


def test_ones_own_schedule_keeps_idle_replicas() -> None:
    mine = named_schedule("gpipe", 2, 1, replicas=(2, 3))
    plan = Plan.from_schedule(mine, balance=(1, 1))
    assert plan.built_schedule == mine and Plan.from_json(plan.to_json()) == plan
    unsaid = replace(mine, placement=((0,), (2,)))
    assert choose_schedule(unsaid, 1, replicas=(2, 3)).built == mine
    with pytest.raises(ScheduleError, match="is on device 2, but stage 1 runs microbatch 0"):
        choose_schedule(unsaid, 1, replicas=(1, 4))
    plan = plan_from_costs(CELLS, num_microbatches=4, replicas=(1, 2))
    assert plan.replicas == (1, 2) and plan.timeline.num_devices == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", {}), "neither num_stages nor num_devices is given"),
        (("1f1b", {"num_stages": 0}), "num_stages is 0; it must be at least 1"),
        (("zb_v", {"num_stages": 5}), "zb_v has 2 stages on each device, so 5 stages are not"),
        (("zb_v", {"num_stages": 6, "num_devices": 2}), "6 stages and 2 devices disagree"),
        (("interleaved", {"num_stages": 5, "num_devices": 2}), "5 stages and 2 devices disagree"),
        ((MINE, {"num_stages": 4}), "'interleaved' has 6 stages, but 4 were asked for"),
        ((MINE, {"num_devices": 3}), "'interleaved' has 2 devices, but 3 were asked for"),
        ((lambda devices, m: MINE, {}), "needs the number of devices; give num_devices"),
    ],
)
def test_numbers_that_disagree(arguments: tuple[object, dict[str, int]], message: str) -> None:
    schedule, numbers = arguments
    with pytest.raises(PlanError, match=message):
        choose_schedule(schedule, 4, **numbers)  # type: ignore[arg-type]


def test_other_microbatches() -> None:
    with pytest.raises(PlanError, match="has 4 microbatches, but 5 were asked for"):
        choose_schedule(MINE, 5)


def test_an_invalid_one_is_shown() -> None:
    wrong = Schedule(
        name="wrong",
        programs=parse_programs("0B0 0F0"),
        placement=((0,),),
        num_microbatches=1,
    )
    with pytest.raises(ScheduleError, match="'wrong': 0B0 comes before 0F0"):
        choose_schedule(wrong, 1)


def test_a_plan_runs_a_schedule_of_ones_own() -> None:
    plan = Plan.from_schedule(MINE, balance=(1, 1, 2, 1, 1, 2), recompute="except_last")
    assert plan.num_devices == 2 and plan.num_microbatches == 4
    assert plan.built_schedule.placement == MINE.placement
    assert Plan.from_json(plan.to_json()) == plan
    planned = plan_from_costs(CELLS, num_microbatches=4, schedule=MINE)
    assert planned.built_schedule == MINE and sum(planned.balance) == len(CELLS)
    assert planned.timeline.num_devices == 2


def test_a_device_without_work_stays_in_a_plan() -> None:
    schedule = Schedule(
        name="idle",
        programs=((), *parse_programs("0F0 0B0"), ()),
        placement=((1,),),
        num_microbatches=1,
    )
    plan = Plan.from_schedule(schedule, balance=(2,))
    assert plan.built_schedule == schedule
    assert Plan.from_json(plan.to_json()).num_devices == 3
