"""Checkpoints from any mesh to any other, and to one process: parameters and optimizer's state.

Under each of five meshes a model is trained and saved, as plain files and by
torch.distributed.checkpoint with AdamW's state; under five others, on as many ranks, and in one
process it is loaded. Every value is compared to the bit. `python -m benchmarks.mesh --checkpoints`.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import stagewise
from benchmarks.mesh.compare import NUM_MICROBATCHES, whole
from benchmarks.mesh.inner import Parallelize, sharded, split, split_and_sharded
from benchmarks.mesh.subjects import Batch, batches, built
from benchmarks.workers import Row, run_workers

MODEL, NUM_SAMPLES, NUM_RANKS = "tied", 16, 4
Values = dict[str, Any]  # by name, as arrays: each tensor sent between processes takes a file


@dataclass(frozen=True)
class Layout:
    """The lengths of "pp" and of other axes, what is done to stages, and the stages' cells."""

    axes: Mapping[str, int]
    parallelize: Parallelize | None = None
    balance: tuple[int, ...] = (4, 4)
    schedule: str = "1f1b"


SAVED: Mapping[str, Layout] = {
    "replicas": Layout({"pp": 2, "dp": 2}),
    "fully sharded": Layout({"pp": 2, "dp_shard": 2}, sharded),
    "hybrid": Layout({"pp": 1, "dp_replicate": 2, "dp_shard": 2}, sharded, (8,)),
    "split": Layout({"tp": 2, "pp": 2}, split),
    "split and sharded": Layout({"pp": 1, "dp_shard": 2, "tp": 2}, split_and_sharded, (8,)),
}
LOADED: Mapping[str, Layout] = {
    "four stages": Layout({"pp": 4}, None, (1, 3, 3, 1)),
    "four shards": Layout({"pp": 1, "dp_shard": 4}, sharded, (8,)),
    "four parts": Layout({"pp": 1, "tp": 4}, split, (8,)),
    "another cut, sharded": Layout({"dp_shard": 2, "pp": 2}, sharded, (3, 5)),
    "two stages each, split": Layout({"pp": 2, "tp": 2}, split, (2, 2, 2, 2), "interleaved"),
}
ONE = "one process"


def made(
    layout: Layout, model: str = MODEL, num_microbatches: int = NUM_MICROBATCHES
) -> tuple[stagewise.Pipeline, Batch]:
    """Return a pipeline, and this rank's part of a batch."""
    mesh = init_device_mesh("cpu", tuple(layout.axes.values()), mesh_dim_names=tuple(layout.axes))
    plan = stagewise.Plan(
        balance=layout.balance, schedule=layout.schedule, num_microbatches=num_microbatches
    )
    pipe = stagewise.Pipeline(
        built(model),
        plan,
        loss=nn.functional.cross_entropy,
        mesh=mesh,
        parallelize=layout.parallelize,
    )
    return pipe, _part(mesh)


def adam(pipe: stagewise.Pipeline) -> torch.optim.Optimizer:
    """Return an optimizer with a state of several tensors for each parameter."""
    return torch.optim.AdamW(pipe.parameters(), lr=0.01, foreach=False)


def _part(mesh: DeviceMesh) -> Batch:
    (batch,) = batches(NUM_SAMPLES, 1)
    number = index = 0
    for name in mesh.mesh_dim_names or ():
        if name.startswith("dp"):
            number, index = max(number, 1) * mesh[name].size(), index * mesh[name].size()
            index += mesh.get_local_rank(name)
    each = NUM_SAMPLES // max(number, 1)
    here = slice(index * each, (index + 1) * each)
    return Batch(batch.tokens[here], batch.target[here])


def stepped(pipe: stagewise.Pipeline, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Take a step; return its loss."""
    optimizer.zero_grad()
    loss = float(pipe.step(batch.tokens, target=batch.target))
    optimizer.step()
    return loss


def state_of(pipe: stagewise.Pipeline, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return it as torch.distributed.checkpoint takes it, and loads it in place."""
    state = {
        f"{name}.{key}": value
        for name, p in pipe.named_parameters()
        for key, value in optimizer.state[p].items()
    }
    return {"model": pipe.state_dict(), "optimizer": state}


def values(tensors: Mapping[str, Tensor]) -> Values:
    """Return all of every tensor."""
    return {name: whole(tensor.detach()).numpy() for name, tensor in tensors.items()}


def saved(folder: str) -> dict[str, Values]:
    """Train and save under every mesh; on every rank return what it has, whole."""
    found = {}
    for name, layout in SAVED.items():
        pipe, batch = made(layout)
        optimizer = adam(pipe)
        stepped(pipe, optimizer, batch)
        pipe.save_checkpoint(Path(folder) / f"{name}, plain")
        state = state_of(pipe, optimizer)
        dcp.save(state, checkpoint_id=f"{folder}/{name}")
        found[name] = values(state["model"]) | values(state["optimizer"])
    return found


def loaded(folder: str, under: str) -> dict[str, tuple[Values, Values]]:
    """Load all that was saved; return by name what plain files gave, and what the others did."""
    (pipe, batch), (plain, _) = made(LOADED[under]), made(LOADED[under])
    optimizer = adam(pipe)
    stepped(pipe, optimizer, batch)  # so that the optimizer has a state to replace
    found = {}
    for name in SAVED:
        plain.load_checkpoint(f"{folder}/{name}, plain")
        state = state_of(pipe, optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        pipe.load_state_dict(state["model"])
        both = values(pipe.state_dict()) | values(state["optimizer"])
        found[name] = values(plain.state_dict()), both
    return found


def alone(folder: str, name: str) -> Values:
    """Return what one process reads from the plain files."""
    plan = stagewise.Plan(balance=(8,), schedule="gpipe", num_microbatches=1)
    state = str(Path(folder) / f"{name}, plain")
    pipe = stagewise.Pipeline(built(MODEL), plan, state=state)
    return values(pipe.state_dict())


def united(ranks: Sequence[Mapping[str, Values]], name: str) -> Values:
    """Return what ranks hold of one model together."""
    return {key: value for rank in ranks for key, value in rank[name].items()}


def verdict(found: Values, expected: Values) -> str:
    """Return "equal", or how many values of how many tensors are not."""
    other = [name for name, value in found.items() if not (value == expected[name]).all()]
    return f"{len(other)} of {len(found)} DIFFER" if other else "equal"


def _on_ranks(folder: str) -> tuple[list[dict[str, Values]], dict[str, Any]] | None:
    import torch.distributed as dist

    own = saved(folder), {under: loaded(folder, under) for under in LOADED}
    every: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, every if dist.get_rank() == 0 else None)
    if dist.get_rank():
        return None
    by_layout = {under: [found[under] for _, found in every] for under in LOADED}
    return [was for was, _ in every], by_layout


def checkpoint_rows() -> list[Row]:
    """Return, for each mesh that saved, a verdict on each that loaded."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        found = run_workers(NUM_RANKS, _on_ranks, folder)
        assert found is not None
        before, after = found
        for name in SAVED:
            expected = united(before, name)
            row = {"saved under": name}
            for under in LOADED:
                told = {verdict(values, expected) for rank in after[under] for values in rank[name]}
                row[under] = ", ".join(sorted(told))
            row[ONE] = verdict(alone(folder, name), expected)
            rows.append(row)
    return rows
