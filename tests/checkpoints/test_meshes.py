"""Checkpoints from any mesh to any other, and as one plain model; on real processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import stagewise
from benchmarks.mesh.compare import NUM_MICROBATCHES
from benchmarks.mesh.inner import Parallelize, sharded, split, split_and_sharded
from benchmarks.mesh.subjects import Batch, batches, built
from tests.harness import Pools
from tests.pipeline.runs import unexamined

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed:UserWarning")

# name -> the lengths of "pp" and of the other axes, and what is done to stages
MESHES: dict[str, tuple[dict[str, int], Parallelize | None]] = {
    "replicas": ({"pp": 2, "dp": 2}, None),
    "fully sharded": ({"pp": 2, "dp_shard": 2}, sharded),
    "hybrid": ({"pp": 1, "dp_replicate": 2, "dp_shard": 2}, sharded),
    "split": ({"tp": 2, "pp": 2}, split),
    "split and sharded": ({"pp": 1, "dp_shard": 2, "tp": 2}, split_and_sharded),
}


def made(name: str, model: str) -> tuple[stagewise.Pipeline, torch.optim.Optimizer, Batch]:
    """A pipeline, its optimizer, and this rank's part of a batch."""
    axes, parallelize = MESHES[name]
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    balance = (8,) if axes["pp"] == 1 else (4, 4)
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=NUM_MICROBATCHES)
    loss = nn.functional.cross_entropy
    pipe = stagewise.Pipeline(built(model), plan, loss=loss, mesh=mesh, parallelize=parallelize)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.01, momentum=0.9, foreach=False)
    return unexamined(pipe), optimizer, part(mesh)


def part(mesh: DeviceMesh) -> Batch:
    (batch,) = batches(16, 1)
    number = index = 0
    for name in mesh.mesh_dim_names or ():
        if name.startswith("dp"):
            number, index = max(number, 1) * mesh[name].size(), index * mesh[name].size()
            index += mesh.get_local_rank(name)
    here = slice(index * 16 // max(number, 1), (index + 1) * 16 // max(number, 1))
    return Batch(batch.tokens[here], batch.target[here])


def stepped(pipe: stagewise.Pipeline, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    optimizer.zero_grad()
    loss = float(pipe.step(batch.tokens, target=batch.target))
    optimizer.step()
    return loss


def whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def values(pipe: stagewise.Pipeline) -> dict[str, Any]:
    """As arrays: each tensor sent between processes takes a file descriptor."""
    return {name: whole(tensor).numpy() for name, tensor in pipe.state_dict().items()}


def state_of(pipe: stagewise.Pipeline, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As torch.distributed.checkpoint takes it, and loads it in place."""
    state = {name: optimizer.state[p]["momentum_buffer"] for name, p in pipe.named_parameters()}
    return {"model": pipe.state_dict(), "optimizer": state}


def saved(folder: str) -> dict[str, Any]:
    """Train under every mesh; save one model as plain files, another with its optimizer."""
    found = {}
    for name in MESHES:
        pipe, optimizer, batch = made(name, "tied")
        stepped(pipe, optimizer, batch)
        pipe.save_checkpoint(Path(folder) / f"{name}, plain")
        plainly = values(pipe)
        pipe, optimizer, batch = made(name, "decoder")
        stepped(pipe, optimizer, batch)
        dcp.save(state_of(pipe, optimizer), checkpoint_id=f"{folder}/{name}")
        before, loss = values(pipe), stepped(pipe, optimizer, batch)
        found[name] = {"plainly": plainly, "before": before, "loss": loss, "after": values(pipe)}
    return found


def loaded(folder: str) -> dict[str, Any]:
    """Load under every mesh every plain model, and from the next one also the optimizer's state."""
    found: dict[str, Any] = {}
    for name, other in zip(MESHES, [*MESHES][1:] + [*MESHES][:1], strict=True):
        tied, _, _ = made(name, "tied")
        plainly = {}
        for one in MESHES:
            tied.load_checkpoint(f"{folder}/{one}, plain")
            plainly[one] = values(tied)
        pipe, optimizer, batch = made(name, "decoder")
        stepped(pipe, optimizer, batch)  # so that the optimizer has a state to replace
        every = state_of(pipe, optimizer)
        dcp.load(every, checkpoint_id=f"{folder}/{other}")
        pipe.load_state_dict(every["model"])
        before, loss = values(pipe), stepped(pipe, optimizer, batch)
        found[other] = {"plainly": plainly, "before": before, "loss": loss, "after": values(pipe)}
        pipe.load_checkpoint(f"{folder}/{other}")  # the model alone, of the same files
        found[other]["alone"] = values(pipe)
    return found


def test_any_mesh_loads_what_any_other_has_saved(tmp_path: Path, own_pools: Pools) -> None:
    """Bit for bit; the optimizer's state goes with it, so the next step is the same."""
    ranks = own_pools[4].run(saved, str(tmp_path), seconds=100)
    expected: dict[str, dict[str, dict[str, Any]]] = {
        name: {
            key: {k: value for rank in ranks for k, value in rank[name][key].items()}
            for key in ("plainly", "before", "after")
        }
        for name in MESHES
    }
    for rank in own_pools[4].run(loaded, str(tmp_path), seconds=100):
        for other, found in rank.items():
            for name, value in (found["before"] | found["alone"]).items():
                assert (value == expected[other]["before"][name]).all(), (other, name)
            for one, state in found["plainly"].items():
                assert all(
                    (value == expected[one]["plainly"][k]).all() for k, value in state.items()
                )
            for name, value in found["after"].items():
                assert abs(value - expected[other]["after"][name]).max() < 1e-13
            assert found["loss"] == pytest.approx(ranks[0][other]["loss"], rel=1e-14)
    for name in MESHES:
        plan = stagewise.Plan(balance=(8,), schedule="gpipe", num_microbatches=1)
        alone = stagewise.Pipeline(built("tied"), plan, state=str(tmp_path / f"{name}, plain"))
        for key, value in alone.state_dict().items():
            assert (value.numpy() == expected[name]["plainly"][key]).all()
