"""Are predictions accurate? Step time and peak memory of three plans, predicted and measured.

The demo, examples/shakespeare.py, runs on two workers of one core each. Each plan is made as
`stagewise train` makes it (cells measured, messages rehearsed), then used for some steps.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
import typer
from stagewise.training.recipe_file import load_recipe

import stagewise
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.training.batches import TrainingBatches
from stagewise.training.recipe import build_model

if TYPE_CHECKING:
    from stagewise.pipeline.plan_model import Microbatches

RECIPE = Path(__file__).parents[1] / "examples" / "shakespeare.py"
NUM_WORKERS, WARMUP_STEPS = 2, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked of `stagewise.plan`."""

    schedule: str
    num_microbatches: "Microbatches"
    recompute: str


CASES = [
    Case(schedule="1f1b", num_microbatches=8, recompute="never"),
    Case(schedule="gpipe", num_microbatches=4, recompute="always"),
    Case(schedule="auto", num_microbatches="auto", recompute="auto"),
]


def main(
    quick: bool = typer.Option(False, help="Fewer steps; takes less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Compare predicted with measured steps of the demo on two workers."""
    rows = run_workers(NUM_WORKERS, measure, CASES, 10 if quick else 40)
    notes = ("difference: measured over predicted, less 1",)
    print_rows("predicted and measured, examples/shakespeare.py", rows, as_json=json, notes=notes)


def measure(cases: Sequence[Case], num_steps: int) -> list[Row]:
    """Run on every rank."""
    return [_measured(case, num_steps) for case in cases]


def _measured(case: Case, num_steps: int) -> Row:
    recipe = load_recipe(RECIPE)
    model = build_model(recipe, seed=0)
    inputs, target = TrainingBatches(recipe, seed=0).first
    plan = stagewise.plan(
        model, inputs, target=target, loss=recipe.loss, num_devices=NUM_WORKERS, **asdict(case)
    )
    pipe = stagewise.Pipeline(model, plan, loss=recipe.loss, weight=recipe.weight)
    peaks = pipe.measure_memory(inputs, target=target)
    seconds = []
    for _ in range(WARMUP_STEPS + num_steps):
        pipe.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        pipe.step(inputs, target=target)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[WARMUP_STEPS:])
    wanted, expected = plan.timeline.duration_seconds, max(plan.peak_activation_bytes)
    return {
        "plan": f"{plan.schedule}, {plan.num_microbatches} microbatches, {case.recompute}",
        "cells per stage": ", ".join(map(str, plan.balance)),
        "predicted_seconds": wanted,
        "measured_seconds": step,
        "seconds_difference": step / wanted - 1,
        "predicted_peak_bytes": expected,
        "measured_peak_bytes": max(peaks),
        "bytes_difference": max(peaks) / expected - 1,
    }


if __name__ == "__main__":
    typer.run(main)
