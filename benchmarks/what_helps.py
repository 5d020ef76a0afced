"""Does what would help help? Predictions from a recorded step, carried out on two workers.

Cells are emulated: they sleep for known times, so two workers run in parallel on any machine. The
step is bad on purpose: an uneven cut, few microbatches, recomputation, one slow worker. It is
recorded; then each plan of `stagewise.diagnosis.what_would_help` is trained with, and the seconds
that it saves stand beside those that were predicted.
"""

import time
import warnings
from statistics import median

import torch
import torch.distributed as dist
import typer

import stagewise
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.costs import CellCost
from stagewise.diagnosis import as_measured, what_would_help
from stagewise.errors import ExactnessWarning
from stagewise.planning import Plan
from stagewise.testing import EmulatedDevice, emulated_model

NUM_CELLS, BALANCE, MICROBATCHES, SAMPLES = 8, (5, 3), 4, 16
FORWARD, WEIGHT = 0.002, 0.002  # seconds of a cell for a microbatch; a backward takes twice as long
SLOW = 1.5  # times, on worker 1
STEPS, QUICK_STEPS, WARM_UP = 20, 5, 9
CHANGES = ("microbatches", "cells per stage", "no recomputation", "zb_h1", "interleaved,", "gpipe")


def main(
    quick: bool = typer.Option(False, help="Fewer steps."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure the gain of every prediction."""
    rows = run_workers(2, measure, quick)
    print_rows("what helps", rows, as_json=json, notes=("seconds saved of a step",))


def measure(quick: bool) -> list[Row]:
    """Run on every rank: record, predict, and carry out."""
    number = QUICK_STEPS if quick else STEPS
    cost = {"forward_seconds": FORWARD, "backward_seconds": 2 * FORWARD}
    plan = stagewise.Plan(
        balance=BALANCE,
        schedule="1f1b",
        num_microbatches=MICROBATCHES,
        recompute="always",
        cells=tuple(CellCost(name=str(index), **cost) for index in range(NUM_CELLS)),
    )
    pipe = _pipeline(plan, 1.0)
    with pipe.record() as recorder:
        _steps(pipe, number)
    measured = as_measured(recorder.recording)
    assert measured is not None
    rows: list[Row] = []
    for one in what_would_help(measured):
        even = "pace of the others" in one.change
        if not even and not any(change in one.change for change in CHANGES):
            continue
        scale = MICROBATCHES / one.plan.num_microbatches
        other = _pipeline(one.plan, scale, slow=1.0 if even else SLOW)
        turns = [(median(_steps(pipe, number)), median(_steps(other, number))) for _ in range(3)]
        before, after = map(median, zip(*turns, strict=True))
        rows.append(
            {
                "change": one.change,
                "step_ms": 1e3 * before,
                "predicted_ms": 1e3 * one.seconds,
                "measured_ms": 1e3 * (before - after),
                "off_by_of_step": abs(one.seconds - (before - after)) / before,
            }
        )
    return rows


def _pipeline(plan: Plan, scale: float, slow: float = SLOW) -> stagewise.Pipeline:
    """Return a warm pipeline; microbatches take `scale` times as long."""
    own = scale * (slow if dist.get_rank() == 1 else 1.0)
    seconds = [own * FORWARD] * NUM_CELLS
    twice, weights = [2 * each for each in seconds], [own * WEIGHT] * NUM_CELLS
    model = emulated_model(seconds, twice, EmulatedDevice(), weights)
    pipe = stagewise.Pipeline(model, plan, loss=_mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExactnessWarning)  # emulation remembers when it ended
        _steps(pipe, WARM_UP)
    return pipe


def _steps(pipe: stagewise.Pipeline, number: int) -> list[float]:
    x, took = torch.zeros(SAMPLES, 1), []
    for _ in range(number):
        dist.barrier()
        start = time.perf_counter()
        pipe.step(x, target=x)
        took.append(time.perf_counter() - start)
    return took


def _mean(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).mean()


if __name__ == "__main__":
    typer.run(main)
