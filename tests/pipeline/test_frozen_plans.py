"""Plans of models with frozen parts: what is not needed takes no time and no memory."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stagewise
from stagewise.costs import CellCost, stage_costs
from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.plan import plan_from_costs
from stagewise.planning.search.search import search
from stagewise.planning.simulate import simulate
from stagewise.schedule import Kind, needed, validate, with_recompute
from tests.planning.costs import LINKS, stage_costs_drawn
from tests.schedules import Sized, sized


def model(*, frozen: int, width: int = 64) -> nn.Sequential:
    layers = [nn.Linear(width, width) for _ in range(6)]
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    return nn.Sequential(*layers)


def mean_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output, target) * 1.0  # a mean leaves its scratch space behind


def cell(name: str, *, trains: bool) -> CellCost:
    return CellCost(
        name=name,
        forward_seconds=1,
        backward_seconds=2 if trains else 0,
        parameter_bytes=100,
        trainable_bytes=100 if trains else 0,
        activation_bytes=10 if trains else 0,
        output_bytes=5,
        gradient_bytes=5 if trains else 0,
    )


def test_the_cut_follows_what_is_trained() -> None:
    cells = [cell(str(i), trains=i >= 6) for i in range(8)]
    plan = plan_from_costs(cells, num_stages=2, num_microbatches=4)
    assert plan.balance == (6, 2)
    assert {str(s.instruction)[1] for s in plan.timeline.spans if s.device == 0} == {"F"}
    assert plan.timeline.duration_seconds == 6 * 4 + 6
    assert plan.peak_activation_bytes[0] == 0 < plan.peak_activation_bytes[1]
    assert plan.timeline.peak_in_flight(0) == 0
    assert plan.timeline.busy_seconds == (24, 24)


def test_frozen_parameters_have_no_gradients_and_no_optimizer_state() -> None:
    cells = [cell(str(i), trains=i >= 6) for i in range(8)]

    options: Any = {"num_microbatches": [4], "schedules": ["1f1b"], "recompute": "never"}
    found = search(lambda _: cells, 2, **options, memory_bytes=1000)
    # One device holds 600 bytes of frozen parameters; the other 200 four times, and activations.
    assert found.plan.balance == (6, 2)
    assert found.chosen.device_bytes[0] == 600 < 800 < found.chosen.device_bytes[1]
    assert found.schedule_bound_seconds <= found.chosen.seconds
    with pytest.raises(stagewise.errors.PlanError):
        search(lambda _: cells, 2, **options, memory_bytes=590)


@pytest.mark.parametrize("split", [False, True])
def test_costs_measured_and_estimated(split: bool) -> None:
    x, schedule = torch.randn(8, 64), "zb_h1" if split else "1f1b"
    plan = stagewise.plan(
        model(frozen=3),
        x,
        target=x,
        loss=mean_square,
        num_stages=2,
        num_microbatches=2,
        schedule=schedule,
        seconds=0.1,
    )
    estimated = stagewise.estimate(
        model(frozen=3),
        x,
        target=x,
        loss=mean_square,
        num_microbatches=2,
        device="h100",
    )
    for cells in (plan.cells, estimated):
        assert [cell.backward_seconds > 0 for cell in cells] == [False] * 3 + [True] * 3
        assert [cell.gradient_bytes > 0 for cell in cells] == [False] * 3 + [True] * 2 + [False]
        assert [cell.trainable_bytes for cell in cells] == [0] * 3 + [cells[-1].parameter_bytes] * 3
    kept = [
        [(cell.activation_bytes, cell.deferred_bytes) for cell in cells]
        for cells in (plan.cells, estimated)
    ]
    assert [a for a, _ in kept[0]] == [a for a, _ in kept[1]]
    assert not split or kept[0] == kept[1]


@given(sized(max_devices=4, max_microbatches=6), LINKS, st.data())
@settings(max_examples=60, deadline=None)
def test_the_fast_simulator_knows_what_is_needed(
    size: Sized, link: stagewise.costs.LinkCost, data: st.DataObject
) -> None:
    schedule = with_recompute(size.build(), data.draw(st.sampled_from(["never", "always"])))
    first = data.draw(st.integers(0, schedule.num_stages))
    untrained = data.draw(st.sets(st.integers(0, schedule.num_stages - 1)))
    small = validate(needed(schedule, first, untrained))
    costs = [data.draw(stage_costs_drawn()) for _ in range(schedule.num_stages)]
    timeline, fast = simulate(small, costs, link), outcome_of(small, costs, link)
    assert timeline.duration_seconds == fast.seconds
    assert timeline.busy_seconds == fast.busy_seconds
    kinds = {(s.instruction.stage, s.instruction.kind) for s in timeline.spans}
    for stage, kind in kinds:
        assert stage >= first or kind is Kind.FORWARD
        assert stage not in untrained or kind is not Kind.BACKWARD_WEIGHT


def test_a_stage_without_backward_keeps_nothing() -> None:
    cells = [cell(str(i), trains=i >= 2) for i in range(4)]
    whole, mixed, last = stage_costs(cells, [1, 2, 1], input_bytes=7)
    assert (whole.input_bytes, whole.activation_bytes, whole.gradient_bytes) == (0, 0, 0)
    assert (mixed.input_bytes, mixed.activation_bytes, mixed.trainable_bytes) == (5, 10, 100)
    assert last.input_bytes == 5
