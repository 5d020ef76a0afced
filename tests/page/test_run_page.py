"""The page of runs: predicted above measured, memory by device, losses of all runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stagewise.costs import CellCost
from stagewise.page.page_contents import Around
from stagewise.page.run_page import run_page
from stagewise.planning.plan import plan_from_costs
from stagewise.planning.simulate import simulate
from stagewise.recording import (
    Clock,
    Phase,
    RecordedEvent,
    Recorder,
    Recording,
    RunFiles,
    StageMemory,
    recording_from_json,
    step_of,
)

CELLS = [
    CellCost(name=str(n), forward_seconds=1e-3, backward_seconds=2e-3, activation_bytes=4096)
    for n in range(4)
]
PLAN = plan_from_costs(CELLS, num_devices=2, num_microbatches=4)
SECOND = 1_000_000_000


def recorded() -> Recording:
    recorder = Recorder()
    simulate(PLAN.built_schedule, PLAN.engine_costs, PLAN.link, recorder)
    step = step_of([recorder], [0.0], step=7, num_devices=2)
    update = RecordedEvent(
        device=1, what=Phase.OPTIMIZER, start_ns=step.end_ns, end_ns=step.end_ns + SECOND
    )
    longer = replace(step, step=8, events=(*step.events, update))
    longest = replace(
        step, step=9, events=(*step.events, replace(update, end_ns=step.end_ns + 2 * SECOND))
    )
    return Recording(
        num_devices=2,
        clocks=(Clock(rank=1, host="<h>", device="cpu", offset_ns=1500, error_ns=2000),),
        plans=(json.loads(PLAN.to_json()),),
        steps=(step, longest, longer),
        memory=(
            StageMemory(
                stage=0,
                device=0,
                parameter_bytes=0,
                gradient_bytes=0,
                optimizer_bytes=0,
                live=((0, 10), (SECOND, 0)),
            ),
            StageMemory(
                stage=1,
                device=0,
                parameter_bytes=0,
                gradient_bytes=0,
                optimizer_bytes=0,
                live=((SECOND // 2, 5),),
            ),
        ),
        environment={"torch": "2"},
    )


ROWS = (
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": None},
    {"step": 2, "validation_loss": 2.5},
    {"step": "x", "loss": 1.0},
)
RUN = RunFiles(path=Path("runs/a"), rows=ROWS, recording=recorded())


def test_the_predicted_step_stands_above_the_median_measured_one() -> None:
    page = run_page([RUN])
    predicted, measured, *others = page.steps
    assert predicted.name == "predicted: 1f1b, 4 microbatches"
    assert predicted.timeline == PLAN.timeline
    assert measured.name == "measured: step 8, the median"
    assert measured.timeline.duration_seconds == pytest.approx(PLAN.timeline.duration_seconds)
    end = measured.timeline.duration_seconds
    assert measured.around == (Around(1, "optimizer", end, end + 1),)
    assert [step.name for step in others[:3]] == [
        "measured: step 7",
        "measured: step 9",
        "predicted: gpipe, 4 microbatches",
    ]
    assert page.summary["bubble, measured"] == page.summary["bubble, predicted"] == "20.0%"
    assert page.summary["loss"] == "3.0000"


def test_measured_memory_is_the_sum_over_a_devices_stages() -> None:
    assert run_page([RUN]).steps[1].memory == (((0.0, 10), (0.5, 15), (1.0, 5)), ())
    without = replace(RUN, recording=replace(recorded(), memory=()))
    assert run_page([without]).steps[1].memory == tuple(
        run_page([without]).steps[1].timeline.activation_bytes(device, PLAN.engine_costs)
        for device in range(2)
    )


def test_losses_of_several_runs_under_their_names() -> None:
    other = replace(RUN, path=Path("more/a"), recording=None)
    page = run_page([RUN, other])
    assert [losses.run for losses in page.losses] == ["runs/a", "more/a"]
    assert page.losses[0].training == [(1, 3.0)] and page.losses[0].validation == [(2, 2.5)]
    assert page.steps[0].name == "predicted: 1f1b, 4 microbatches (runs/a)"


def test_the_record_is_what_the_runs_wrote() -> None:
    page = run_page([RUN])
    (run,) = page.record["runs"]
    assert run["log"] == list(ROWS)
    assert recording_from_json(json.dumps(run["recording"])) == RUN.recording
    assert page.environment == {"torch": "2", "rank 1": "cpu on <h>, clock +2 us (within 2 us)"}


def test_a_run_without_a_recording_has_its_losses() -> None:
    page = run_page([replace(RUN, recording=None)])
    assert not page.steps and page.losses[0].training == [(1, 3.0)]


def test_before_the_first_step_the_prediction_is_shown() -> None:
    page = run_page([replace(RUN, recording=replace(recorded(), steps=()))])
    assert page.steps[0].timeline == PLAN.timeline
    unplanned = replace(RUN, recording=replace(recorded(), plans=({"balance": "x"},)))
    assert run_page([unplanned]).steps[0].name == "measured: step 8, the median"
