import dataclasses
import itertools
import json
import random

import pytest

from stagewise.costs import CellCost, InstructionCost, LinkCost, stage_costs, without_gradients
from stagewise.errors import PlanError, ScheduleError
from stagewise.planning import Plan, bottleneck_seconds, plan_from_costs, simulate
from stagewise.planning.calibrate import EngineOverhead, with_engine_overhead
from stagewise.schedule import POLICIES, SCHEDULES, Kind

CELLS = tuple(
    CellCost(
        name=f"layers.{index}",
        forward_seconds=seconds,
        backward_seconds=2 * seconds,
        parameter_bytes=40 * index,
        activation_bytes=1000,
        output_bytes=100,
        gradient_bytes=100,
    )
    for index, seconds in enumerate([0.05, 0.2, 0.08, 0.3, 0.06, 0.15, 0.09, 0.25])
)


def make(**changes: object) -> Plan:
    arguments: dict[str, object] = {"num_stages": 4, "num_microbatches": 8, "input_bytes": 10}
    return plan_from_costs(CELLS, **{**arguments, **changes})  # type: ignore[arg-type]


def test_the_cut_is_the_optimal_one() -> None:
    plan = make()
    seconds = [cell.forward_seconds + cell.backward_seconds for cell in CELLS]
    assert bottleneck_seconds(seconds, plan.balance) == pytest.approx(3 * 0.33)
    assert sum(plan.balance) == len(CELLS)
    assert (plan.schedule, plan.recompute, plan.num_stages) == ("1f1b", "never", 4)


def busiest_seconds(plan: Plan, balance: tuple[int, ...]) -> float:
    """Written out: what the device with most to do does for one microbatch."""
    schedule, recomputes = plan.built_schedule, plan.recompute != "never"
    loads = [0.0] * plan.num_devices
    ends = itertools.accumulate(balance)
    for devices, size, end in zip(schedule.placement, balance, ends, strict=True):
        for cell in plan.cells[end - size : end]:
            backward = cell.backward_seconds
            if schedule.splits_backward and cell.input_seconds is not None:
                backward = cell.input_seconds + (cell.weight_seconds or 0)
            for device in devices:
                loads[device] += (1 + recomputes) * cell.forward_seconds + backward
    return max(loads)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_cut_for_its_busiest_device(name: str) -> None:
    rng = random.Random(name)
    each = SCHEDULES[name].stages_per_device
    for _ in range(25):
        num_devices = rng.randint(1, 3)
        num_stages = num_devices * each
        num_cells = rng.randint(num_stages, num_stages + 4)
        cells = [
            CellCost(
                name=str(index),
                forward_seconds=rng.randint(0, 9),
                backward_seconds=rng.randint(0, 20),
                input_seconds=rng.randint(0, 9),
                weight_seconds=rng.randint(0, 9),
            )
            for index in range(num_cells)
        ]
        plan = plan_from_costs(
            cells,
            num_devices=num_devices,
            num_microbatches=4 * num_devices,
            schedule=name,
            recompute=rng.choice(["never", "always"]),
        )
        cuts = itertools.combinations(range(1, num_cells), num_stages - 1)
        least = min(
            busiest_seconds(plan, tuple(b - a for a, b in itertools.pairwise((0, *cut, num_cells))))
            for cut in cuts
        )
        assert busiest_seconds(plan, plan.balance) == pytest.approx(least)


def test_recomputation_and_transfer_enter_the_cut() -> None:
    def cells(forwards: list[float], backwards: list[float], output: list[int]) -> list[CellCost]:
        return [
            CellCost(name=str(i), forward_seconds=f, backward_seconds=b, output_bytes=o)
            for i, (f, b, o) in enumerate(zip(forwards, backwards, output, strict=True))
        ]

    counts = {"num_stages": 2, "num_microbatches": 4}
    uneven = cells([4, 1, 1], [0, 2, 2], [0, 0, 0])
    assert plan_from_costs(uneven, **counts).balance == (1, 2)
    late = cells([3, 3, 3, 0], [0, 0, 3, 4], [0, 0, 0, 0])
    assert plan_from_costs(late, **counts).balance == (2, 2)
    assert plan_from_costs(late, **counts, recompute="always").balance == (2, 2)
    wide = cells([1, 1, 1, 1], [1, 1, 1, 1], [0, 50, 1, 0])
    slow = LinkCost(seconds_per_byte=0.1)
    assert plan_from_costs(wide, **counts).balance == (2, 2)
    assert plan_from_costs(wide, **counts, link=slow).balance in {(1, 3), (3, 1)}


def test_a_given_balance_is_kept_and_checked() -> None:
    assert make(balance=[1, 1, 1, 5]).balance == (1, 1, 1, 5)
    with pytest.raises(PlanError, match="places 7 cells but the model has 8"):
        make(balance=[1, 1, 1, 4])
    with pytest.raises(PlanError, match="has 2 stages but num_stages is 4"):
        make(balance=[4, 4])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_json_round_trips(name: str, policy: str) -> None:
    link = LinkCost(latency_seconds=1e-4, seconds_per_byte=1e-9)
    plan = make(schedule=name, recompute=policy, link=link)
    assert plan.num_stages == 4
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.timeline == plan.timeline


def test_an_older_plans_name_of_the_overhead_is_read() -> None:
    overhead = InstructionCost(forward_seconds=0.5, backward_seconds=-0.25)
    plan = make()
    plan = dataclasses.replace(
        plan, cells=with_engine_overhead(plan.cells, EngineOverhead(per_stage=overhead))
    )
    text = plan.to_json()
    assert Plan.from_json(text.replace('"instruction_overhead"', '"around"')) == plan
    cells = [{**cell} for cell in json.loads(text)["cells"]]
    for cell in cells:
        del cell["instruction_overhead"]
    without = Plan.from_json(json.dumps({**json.loads(text), "cells": cells}))
    assert without.cells == make().cells


def test_the_timeline_is_the_simulators() -> None:
    plan = make(recompute="always", link=LinkCost(latency_seconds=0.01))
    costs = stage_costs(CELLS, plan.balance, input_bytes=10)
    assert plan.stage_costs == costs
    assert plan.timeline == simulate(plan.built_schedule, costs, plan.link)
    assert any(span.instruction.kind is Kind.RECOMPUTE for span in plan.timeline.spans)


def test_predicted_memory_follows_microbatches_in_flight() -> None:
    held = [1000 * cells for cells in make().balance]
    inputs = [10, 100, 100, 100]
    one = [h + i for h, i in zip(held, inputs, strict=True)]
    gpipe, one_f_one_b = make(schedule="gpipe"), make()
    assert gpipe.peak_activation_bytes == tuple(8 * each for each in one)
    assert one_f_one_b.peak_activation_bytes == tuple(
        (4 - stage) * each for stage, each in enumerate(one)
    )


def test_recomputation_keeps_inputs_and_one_graph() -> None:
    plan = make(schedule="gpipe", recompute="always")
    balance = plan.balance
    # 7 inputs wait while the last microbatch, whose backward comes at once, keeps its graph.
    assert plan.peak_activation_bytes[1] == 8 * 100 + 1000 * balance[1]


def test_a_plan_without_costs_predicts_nothing() -> None:
    plan = Plan(balance=(2, 2), schedule="gpipe", num_microbatches=4)
    assert plan.built_schedule.num_stages == 2
    with pytest.raises(PlanError, match="has no predictions; give plan\\(\\) an example batch"):
        _ = plan.timeline


def test_a_plan_is_checked_when_made() -> None:
    with pytest.raises(ScheduleError, match="there is no schedule 'zigzag'"):
        make(schedule="zigzag")
    with pytest.raises(ScheduleError, match="there is no recompute policy 'maybe'"):
        make(recompute="maybe")
    with pytest.raises(ScheduleError, match="num_microbatches is 0"):
        make(num_microbatches=0)
    with pytest.raises(PlanError, match="9 stages need at least as many cells"):
        make(num_stages=9)
    with pytest.raises(PlanError, match="places 3 cells but the model has 8"):
        Plan(balance=(1, 2), schedule="gpipe", num_microbatches=1, cells=CELLS)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().schedule = "gpipe"  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"balance": [1]}', "null"])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(
        PlanError, match=r"this is not a plan .*give the text that Plan.to_json\(\)"
    ):
        Plan.from_json(text)


def test_a_plan_with_programs_of_its_own() -> None:
    programs = ("0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0")
    plan = Plan(balance=(2,) * 4, schedule="mine", programs=programs, num_microbatches=1)
    assert plan.num_devices == 2
    assert plan.built_schedule.placement == ((0,), (1,), (0,), (1,))
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="'mine' have 4 stages, but the plan has 2"):
        dataclasses.replace(plan, balance=(4, 4))
    with pytest.raises(PlanError, match="'mine' have 1 microbatches, but the plan has 3"):
        dataclasses.replace(plan, num_microbatches=3)


def test_a_cut_that_knows_what_is_frozen_is_a_third_faster() -> None:
    cells = [
        CellCost(
            name=str(i),
            forward_seconds=2,
            backward_seconds=2,
            input_seconds=2,
            weight_seconds=0,
            parameter_bytes=8,
            trainable_bytes=0 if i < 8 else 1,
        )
        for i in range(16)
    ]
    blind = [dataclasses.replace(cell, trainable_bytes=1) for cell in cells]
    of_blind, of_aware = (
        plan_from_costs(costs, num_stages=2, num_microbatches=8)
        for costs in (blind, without_gradients(cells))
    )
    assert (of_blind.balance, of_aware.balance) == ((8, 8), (10, 6))
    assert (
        dataclasses.replace(of_blind, cells=without_gradients(cells)).timeline.duration_seconds
        == 272
    )
    assert (of_blind.timeline.duration_seconds, of_aware.timeline.duration_seconds) == (288, 216)
