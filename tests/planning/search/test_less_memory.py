"""What a plan that ran out of memory is changed to."""

from dataclasses import fields

import pytest

from stagewise.costs import CellCost, FarOutput
from stagewise.planning.plan import Plan
from stagewise.planning.refit import with_microbatches
from stagewise.planning.search.less_memory import larger_counts, share_in_flight, with_less_memory

CELL = CellCost(
    name="cell",
    forward_seconds=1.0,
    backward_seconds=2.0,
    activation_bytes=80,
    output_bytes=16,
    weight_seconds=1.5,
)


def plan_of(num_stages: int = 2, **options: object) -> Plan:
    defaults: dict[str, object] = {"schedule": "1f1b", "num_microbatches": 4}
    return Plan(balance=(1,) * num_stages, **{**defaults, **options})  # type: ignore[arg-type]


def changes(plan: Plan, num_samples: int) -> list[tuple[int, str]]:
    """Every change in turn until nothing is left."""
    made = []
    while (found := with_less_memory(plan, num_samples)) is not None:
        plan, _ = found
        made.append((plan.num_microbatches, plan.recompute))
    return made


def test_1f1b_keeps_as_many_microbatches_however_small_they_are() -> None:
    assert share_in_flight(plan_of()) == 1 / 2
    assert share_in_flight(plan_of(num_microbatches=8)) == 1 / 4
    assert changes(plan_of(), 12) == [(6, "never"), (12, "never"), (12, "always")]


def test_gpipe_keeps_all_so_only_recomputation_helps_at_first() -> None:
    assert share_in_flight(plan_of(schedule="gpipe")) == 1
    assert changes(plan_of(schedule="gpipe"), 8) == [(4, "always"), (8, "always")]


def test_fewer_microbatches_than_stages_are_all_in_flight() -> None:
    plan, reason = with_less_memory(plan_of(4, num_microbatches=2), 8) or (None, "")
    assert plan is not None and plan.num_microbatches == 8, "4 would be in flight all the same"
    assert "at most 50% of the batch is then in flight on a device, not 100%" in reason


def test_an_end() -> None:
    assert with_less_memory(plan_of(num_microbatches=4, recompute="always"), 4) is None
    own = plan_of(1, schedule="mine", programs=("0F0 0B0",), num_microbatches=1)
    assert changes(own, 8) == [(1, "always")], "its programs are for one number of microbatches"


@pytest.mark.parametrize(
    ("count", "samples", "wanted"),
    [(4, 12, [6, 12]), (3, 7, [6, 7]), (1, 5, [2, 4, 5]), (8, 8, [])],
)
def test_larger_counts(count: int, samples: int, wanted: list[int]) -> None:
    assert list(larger_counts(count, samples)) == wanted


def test_costs_of_a_smaller_microbatch() -> None:
    plan = with_microbatches(plan_of(cells=(CELL, CELL), input_bytes=8), 8)
    cell = plan.cells[0]
    assert (cell.forward_seconds, cell.backward_seconds, cell.weight_seconds) == (0.5, 1.0, 0.75)
    assert (cell.activation_bytes, cell.output_bytes, plan.input_bytes) == (40, 8, 4)
    assert cell.input_seconds is None and cell.deferred_bytes is None


def test_every_cost_of_a_smaller_microbatch_is_scaled() -> None:
    """All fields but what does not depend on its size: a new one is scaled, or said not to be."""
    fixed = {
        "name",
        "parameter_bytes",
        "trainable_bytes",
        "instruction_overhead",
        "far_outputs",
    }
    scaled = [field.name for field in fields(CellCost) if field.name not in fixed]
    far = (FarOutput(0, 8, 8),)  # to a cell so many further, whatever its size
    cell = CellCost(name="cell", parameter_bytes=8, far_outputs=far, **dict.fromkeys(scaled, 8))  # type: ignore[arg-type]
    (smaller,) = with_microbatches(plan_of(1, cells=(cell,)), 8).cells
    assert smaller.far_outputs == ((0, 4, 4),)
    assert {name: getattr(smaller, name) for name in scaled} == dict.fromkeys(scaled, 4)
    assert (smaller.name, smaller.parameter_bytes, smaller.instruction_overhead) == (
        "cell",
        8,
        cell.instruction_overhead,
    )
