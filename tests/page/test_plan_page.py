"""The page of a plan has its rivals beside it."""

from stagewise.costs import CellCost
from stagewise.page.plan_page import plan_page
from stagewise.planning import Plan
from stagewise.planning.plan import plan_from_costs
from stagewise.planning.search.search import search
from stagewise.schedule import SCHEDULES

CELLS = [
    CellCost(name=str(n), forward_seconds=1, backward_seconds=2, activation_bytes=1 << 20)
    for n in range(8)
]


def planned(**wishes: object) -> Plan:
    return plan_from_costs(CELLS, **{"num_devices": 2, "num_microbatches": 4, **wishes})


def test_a_plan_beside_all_other_schedules() -> None:
    plan = planned()
    page = plan_page(plan, {"a": 1}, title="t", environment={})
    assert page.steps[0].timeline == plan.timeline
    assert page.steps[0].memory == tuple(
        plan.timeline.activation_bytes(device, plan.engine_costs) for device in range(2)
    )
    rivals = {step.name.split(",")[0]: step for step in page.steps}
    assert rivals.keys() == SCHEDULES.keys()
    zb_v = planned(schedule="zb_v")
    assert rivals["zb_v"].timeline == zb_v.timeline


def test_schedules_that_do_not_fit_are_left_out() -> None:
    few = plan_from_costs(CELLS[:2], num_devices=2, num_microbatches=4)
    names = {step.name.split(",")[0] for step in plan_page(few, {}, title="", environment={}).steps}
    assert "1f1b" in names and "interleaved" not in names


def test_a_search_beside_its_runners_up() -> None:
    found = search(lambda count: CELLS, 2, num_microbatches=[4], synthesis=False)
    page = plan_page(found.plan, {}, title="", environment={}, found=found)
    assert len(page.steps) == 1 + len(found.runners_up)
    assert page.steps[1].timeline == found.runners_up[0].plan().timeline


def test_what_is_too_much_to_draw_stays_in_the_tables() -> None:
    plan = planned(num_microbatches=500)
    page = plan_page(plan, {}, title="", environment={})
    assert len(page.steps) > page.num_drawn >= 2
    records = [step.to_record(drawn=n < page.num_drawn) for n, step in enumerate(page.steps)]
    assert ["spans" in record for record in records] == [
        n < page.num_drawn for n in range(len(records))
    ]
    assert all("step_seconds" in record for record in records)
