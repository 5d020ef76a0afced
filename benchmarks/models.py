"""Unmodified models of transformers, torchvision and PEFT through the pipeline, beside themselves.

Each is captured (the last two are cut by paths instead), planned and trained for a step at every
number of stages, and compared with the plain model: loss, gradients, another batch size,
evaluation, names. The models are those of `benchmarks.unmodified`, in float64 where they can run
so. `make test-models` runs this in an environment of its own; it fails if a row does.

Times are one step's without optimizer, median of three; with all stages in one process the
pipelined one cannot be faster.
"""

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

import stagewise
from benchmarks.unmodified import ENTRIES, Batch, Entry
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.model.captured import captured_of

STAGES = (2, 4)
NUM_SAMPLES, OTHER_NUM_SAMPLES, NUM_MICROBATCHES = 8, 6, 4
NOTE = (
    "differences: of the loss, in absolute terms; of gradients, over the largest gradient; "
    "M=1 where microbatches cannot give the whole batch's loss, for the reason given"
)
# Relative errors by the dtype that the loss is computed in; transformers computes it in float32.
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Numbers:
    """What a model gives for one batch."""

    loss: Tensor
    gradients: Mapping[str, Tensor | None]


def plain_step(model: nn.Module, entry: Entry, batch: Batch) -> Numbers:
    """The plain model's loss and gradients."""
    model.zero_grad()
    loss = plain_loss(model, entry, batch)
    loss.backward()
    return Numbers(loss.detach(), gradients_of(model.named_parameters()))


def plain_loss(model: nn.Module, entry: Entry, batch: Batch) -> Tensor:
    """The plain model's loss."""
    inputs = {name: value for name, value in batch.items() if name != "target"}
    return entry.loss(model(**inputs), *([batch["target"]] if "target" in batch else []))


def gradients_of(named: Any) -> dict[str, Tensor | None]:
    """Copies of the gradients, by name."""
    return {n: None if p.grad is None else p.grad.detach().clone() for n, p in named}


def difference(ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None]) -> float:
    """The largest difference of `ours` over the largest gradient; infinite where one lacks."""
    scale = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    worst = 0.0
    for name, gradient in ours.items():
        other = theirs[name]
        if gradient is None or other is None:
            # An unused parameter has no gradient in either, or one of zeros.
            rest = [g for g in (gradient, other) if g is not None]
            worst = max([worst, *(float(g.abs().max()) / scale for g in rest)])
        else:
            worst = max(worst, float((gradient - other).abs().max()) / scale)
    return over_ranks(worst)


def over_ranks(value: float) -> float:
    """The largest of all ranks' values."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def whole_state(pipe: stagewise.Pipeline) -> dict[str, Tensor]:
    """All ranks' states as one."""
    states = [pipe.state_dict()]
    if pipe.num_ranks > 1:
        states *= pipe.num_ranks
        dist.all_gather_object(states, pipe.state_dict())
    return {name: tensor for state in states for name, tensor in state.items()}


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating tensors in `dtype`."""
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}


def seconds_of(run: Callable[[], object]) -> float:
    """Median of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rows_of(entry: Entry, stages: tuple[int, ...], transport: str) -> list[Row]:
    """The table's rows for one model; every rank calls this."""
    torch.manual_seed(0)
    model = entry.build().to(entry.dtype).train()
    plain = copy.deepcopy(model)
    batch = in_dtype(entry.batch(NUM_SAMPLES), entry.dtype)
    other = in_dtype(entry.batch(OTHER_NUM_SAMPLES), entry.dtype)
    wanted = plain_step(plain, entry, batch)
    plain_seconds = seconds_of(lambda: plain_step(plain, entry, batch))
    state = copy.deepcopy(model.state_dict())
    rows = []
    for num_stages in stages:
        model.load_state_dict(state)
        model.zero_grad()
        try:
            rows.append(
                row(entry, model, plain, num_stages, transport, batch, other, wanted)
                | {"plain ms": f"{1e3 * plain_seconds:.0f}"}
            )
        except stagewise.StagewiseError as error:
            rows.append({"model": entry.name, "K": num_stages, "passes": f"no: {error}"})
    return rows


def row(
    entry: Entry,
    model: nn.Module,
    plain: nn.Module,
    num_stages: int,
    transport: str,
    batch: Batch,
    other: Batch,
    wanted: Numbers,
) -> dict[str, str | int | float | None]:
    """One model at one number of stages beside the plain model."""
    inputs = {name: value for name, value in batch.items() if name != "target"}
    count = 1 if entry.whole_batch else NUM_MICROBATCHES
    plan = stagewise.plan(
        model,
        kwargs=inputs,
        target=batch.get("target"),
        loss=entry.loss,
        num_stages=num_stages,
        num_microbatches=count,
        seconds=0.2,
        cells=entry.cells,
    )
    captured = captured_of(model)
    assert captured is not None
    names = [cell.name for cell in captured.chain]
    ends = [sum(plan.balance[: stage + 1]) for stage in range(num_stages - 1)]
    pipe = stagewise.Pipeline(model, plan, loss=entry.loss, transport=transport)  # type: ignore[arg-type]
    loss = pipe.step(**batch)
    grads = difference(gradients_of(pipe.named_parameters()), wanted.gradients)
    pipe.zero_grad()
    plain.train()
    change = pipe.step(**other) - plain_step(plain, entry, other).loss
    plain.load_state_dict(whole_state(pipe))  # the same running statistics
    plain.eval()
    with torch.no_grad():
        evaluated = pipe.evaluate(**batch) - plain_loss(plain, entry, batch)
    step_seconds = seconds_of(lambda: pipe.step(**batch))
    same = sorted(whole_state(pipe)) == sorted(model.state_dict()) and (
        pipe.num_ranks > 1 or list(pipe.state_dict()) == list(model.state_dict())
    )
    allowed = ALLOWED[wanted.loss.dtype] * float(wanted.loss.abs())
    errors = {
        "loss": float((loss - wanted.loss).abs()),
        "batch size": float(change.abs()),
        "eval": float(evaluated.abs()),
    }
    failed = [what for what, error in errors.items() if not error <= allowed]
    failed += ["gradients"] * (not grads <= ALLOWED[entry.dtype])
    failed += ["names"] * (not same)
    return {
        "model": entry.name,
        "K": num_stages,
        "M": count,
        "captured by": "cells=" if entry.cells else "torch.export",
        "cells": len(names),
        "cut before": ", ".join(names[end] for end in ends),
        "loss diff": f"{errors['loss']:.0e}",
        "max grad diff": f"{grads:.0e}",
        "names equal": "yes" if same else "no",
        "other batch size": f"{errors['batch size']:.0e}",
        "eval diff": f"{errors['eval']:.0e}",
        "pipelined ms": f"{1e3 * step_seconds:.0f}",
        "passes": f"no: {', '.join(failed)}" if failed else "yes",
        "note": f"M=1: {entry.whole_batch}" if entry.whole_batch else "",
    }


def table(only: str, stages: tuple[int, ...], transport: str) -> list[Row]:
    """All rows; every rank calls this."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for entry in ENTRIES:
        if only.lower() in entry.name.lower():
            rows += rows_of(entry, stages, transport)
            print(f"{entry.name}: {rows[-1]['passes']}", file=sys.stderr, flush=True)
    return rows


def main(json: bool = False, only: str = "", processes: bool = False) -> None:
    """Print the table; exit status 1 if a model does not pass.

    --processes runs every stage in a process of its own; --only takes a part of a model's name.
    """
    if processes:
        rows = [r for k in STAGES for r in run_workers(k, table, only, (k,), "distributed")]
    else:
        rows = table(only, STAGES, "local")
    print_rows("unmodified models, pipelined", rows, as_json=json, notes=[NOTE])
    if any(row["passes"] != "yes" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
