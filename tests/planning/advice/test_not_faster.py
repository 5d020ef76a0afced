"""Why devices gain nothing: the largest share of the time, with its remedy."""

import dataclasses

import pytest

from stagewise.costs import CellCost, InstructionCost, LinkCost
from stagewise.planning import Plan, plan_from_costs
from stagewise.planning.advice.not_faster import not_faster
from stagewise.planning.alternatives import one_device_seconds


def plan(*seconds: float, **changes: object) -> Plan:
    cells = [
        CellCost(name=str(i), forward_seconds=s, backward_seconds=2 * s, output_bytes=1)
        for i, s in enumerate(seconds)
    ]
    asked: dict[str, object] = {"num_stages": 2, "num_microbatches": 8}
    return plan_from_costs(cells, **{**asked, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            plan(1, 1, num_microbatches=1),
            "Filling and draining with 1 microbatches takes 50% of the time: raise them to 8 "
            "(--microbatches 8)",
        ),
        (
            plan(1, 1, link=LinkCost(latency_seconds=20)),
            "Transfers take ",
        ),
        (plan(1, 100), "Unequal stages leave "),
        (plan(1, 1, num_microbatches=1, recompute="always"), "Filling and draining"),
    ],
)
def test_the_largest_cause_is_told_with_its_remedy(made: Plan, told: str) -> None:
    said = not_faster(made, made.timeline.duration_seconds)
    assert said is not None and told in said
    assert said.startswith("2 devices are not faster than one: a step takes ")
    assert "data parallelism (--replicas 2)" in said


def test_what_a_run_adds_to_the_plan_is_a_cause() -> None:
    said = not_faster(plan(1, 1), 100.0)
    assert said is not None and "73% of a step is none of the cells' and messages' time" in said
    assert "one device would take 48 s" in said


def test_a_plan_that_is_faster_has_nothing_to_tell() -> None:
    made = plan(1, 1)
    assert one_device_seconds(made) == 48
    assert not_faster(made, made.timeline.duration_seconds) is None
    assert not_faster(plan(1, num_stages=1), 1e9) is None
    assert not_faster(Plan(balance=(1, 1), num_microbatches=2), 1e9) is None


def test_what_instructions_take_beyond_their_cells_counts_on_one_device_too() -> None:
    less = InstructionCost(forward_seconds=-0.5, backward_seconds=-1)
    made = plan(1, 1, num_microbatches=1)
    cells = tuple(dataclasses.replace(cell, instruction_overhead=less) for cell in made.cells)
    made = dataclasses.replace(made, cells=cells)
    assert one_device_seconds(made) == 3 == made.timeline.duration_seconds
    assert not_faster(made, 3.0) is not None
