"""The same cells by torch.distributed.pipelining, written as its documentation has it.

Stages of the same cells, the same treatment of each stage, and what a careful user adds: averages
over data ranks by DistributedDataParallel where nothing is sharded, norms over all stages. Each
cell has processes of its own, which are ended when they hang: what comes of it is its status.
`python -m benchmarks.mesh.torch_side CELL SAMPLES` runs one.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.mesh.compare import (
    MAX_NORM,
    NUM_MICROBATCHES,
    NUM_SAMPLES,
    NUM_STEPS,
    Cell,
    Outcome,
    batches,
    own_part,
    plain,
    whole,
)
from benchmarks.mesh.inner import INNER
from benchmarks.mesh.subjects import built
from benchmarks.mesh.table import judged, plan_of
from benchmarks.workers import Row, run_workers

SECONDS, EVEN = 90, 16
_SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb_v": ScheduleZBVZeroBubble,
}


def why_not(cell: Cell) -> str | None:
    """Say why torch cannot be asked for a cell."""
    if cell.schedule not in _SCHEDULES:
        return "torch chooses no schedule"
    if cell.inner == "EP":
        return "torch has no layer of experts whose gradients it sums beside others"
    return INNER[cell.inner].why_not.get(cell.model)


class Stage(nn.Sequential):
    """Cells of a stage; what the one before returned as a tuple comes as several arguments."""

    def forward(self, *received: object) -> object:
        return super().forward(received[0] if len(received) == 1 else received)


def _stages_of(cell: Cell, mesh: DeviceMesh) -> list[PipelineStage]:
    inner, balance = INNER[cell.inner], plan_of(cell).balance
    rank, number = mesh.get_local_rank("pp"), len(balance)
    second = number - 1 - rank if cell.schedule == "zb_v" else rank + cell.pp
    model, made = built(cell.model), []
    for index in [rank] if number == cell.pp else [rank, second]:
        first = sum(balance[:index])
        own = range(first, first + balance[index])
        module: nn.Module = Stage(OrderedDict((str(i), model[i]) for i in own))
        if inner.parallelize is not None:
            inner.parallelize(module, mesh, index)
        if inner.data_axes and not any("shard" in name for name in inner.axes):
            averaged = mesh[inner.data_axes]
            group = averaged if averaged.ndim == 1 else averaged._flatten()
            module = DistributedDataParallel(module, process_group=group.get_group())
        stage = PipelineStage(
            module, index, number, torch.device("cpu"), group=mesh.get_group("pp")
        )
        made.append(stage)
    return made


def on_mesh(cell: Cell, num_samples: int) -> Outcome:
    """Train on this rank, as `compare.on_mesh` does with stagewise."""
    inner = INNER[cell.inner]
    names = ("pp", *inner.axes)
    mesh = init_device_mesh("cpu", (cell.pp, *inner.axes.values()), mesh_dim_names=names)
    stages = _stages_of(cell, mesh)
    schedule = _SCHEDULES[cell.schedule](
        stages if cell.schedule in ("interleaved", "zb_v") else stages[0],  # type: ignore[arg-type]
        NUM_MICROBATCHES,
        loss_fn=nn.functional.cross_entropy,
    )
    named = {
        name.removeprefix("module."): p
        for stage in stages
        for name, p in stage.submod.named_parameters()
    }
    own = [p for p in named.values() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": own}], lr=0.01, foreach=False)
    has_first = any(stage.is_first for stage in stages)
    has_last, outcome = any(stage.is_last for stage in stages), Outcome()
    for batch in batches(num_samples, NUM_STEPS):
        mine = own_part(batch, inner, mesh)
        losses: list[torch.Tensor] = []
        optimizer.zero_grad()
        given = (mine.tokens,) if has_first else ()
        schedule.step(*given, **({"target": mine.target, "losses": losses} if has_last else {}))
        outcome.losses.append(_mean_loss(losses, mesh, inner.data_axes))
        grads = [p.grad for p in own if p.grad is not None]
        squares = whole(get_total_norm(grads, foreach=False)).square()
        dist.all_reduce(squares, group=mesh.get_group("pp"))
        clip_grads_with_norm_(own, MAX_NORM, squares.sqrt(), foreach=False)
        outcome.norms.append(float(squares.sqrt()))
        optimizer.step()
    for name, parameter in named.items():
        outcome.parameters[name] = whole(parameter.detach())
        gradient = parameter.grad
        outcome.gradients[name] = None if gradient is None else whole(gradient)
    return outcome


def _mean_loss(losses: list[torch.Tensor], mesh: DeviceMesh, data_axes: tuple[str, ...]) -> float:
    found = torch.stack([loss.detach() for loss in losses]).mean() if losses else torch.zeros(())
    found = found.double()
    dist.all_reduce(found, group=mesh.get_group("pp"))
    for name in data_axes:
        dist.all_reduce(found, group=mesh.get_group(name))
        found /= mesh[name].size()
    return float(found)


def _worker(cell: Cell, num_samples: int, folder: str) -> Row | None:
    try:
        outcome = on_mesh(cell, num_samples)
    except Exception as error:
        Path(folder, str(dist.get_rank())).write_text(f"{type(error).__name__}: {error}")
        raise
    every: list[Outcome | str] = [""] * dist.get_world_size()
    dist.gather_object(outcome, every if dist.get_rank() == 0 else None)
    return judged(cell, every, plain(cell, num_samples)) if dist.get_rank() == 0 else None


def in_words(cell: Cell, num_samples: int) -> str:
    """Say what comes of a cell under torch, in processes that are ended when they hang."""
    if (reason := why_not(cell)) is not None:
        return f"not tried: {reason}"
    command = [sys.executable, "-m", "benchmarks.mesh.torch_side", json.dumps(asdict(cell))]
    run = subprocess.Popen(
        [*command, str(num_samples)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = run.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGTERM)  # the launcher ends its workers
        try:
            run.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
        return f"hangs ({SECONDS} s)"
    lines = (out or err).strip().splitlines()
    return lines[-1] if lines else f"ends with code {run.returncode}"


def main() -> None:
    """Print what comes of the cell that is named on the command line."""
    cell, num_samples = Cell(**json.loads(sys.argv[1])), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = run_workers(cell.world, _worker, cell, num_samples, folder)
        except ChildFailedError:
            said = [path.read_text() for path in sorted(Path(folder).iterdir())]
            own = [text for text in said if "Connection" not in text] or said or ["no word"]
            print("fails: " + " ".join(own[0].split())[:160])
            return
    assert row is not None
    numbers = [row[f"{what}_difference"] for what in ("loss", "gradient", "parameter")]
    worst = max(number for number in numbers if isinstance(number, float))
    is_exact = row["status"] == "exact"
    print("exact" if is_exact else f"wrong: {worst:.1e}")


def with_torch(row: Row) -> Row:
    """Return a row of the table with what torch does: uneven parts as there, and even ones."""
    cell = Cell(*(row[key] for key in ("pp", "inner", "schedule", "model")))  # type: ignore[arg-type]
    found = {"torch": in_words(cell, NUM_SAMPLES), "torch_even": in_words(cell, EVEN)}
    return {**row, **found}


if __name__ == "__main__":
    main()
