"""Checkpoints from any mesh to any other, and as one plain model; on real processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import stagewise
from benchmarks.mesh.checkpoints import SAVED as MESHES
from benchmarks.mesh.checkpoints import made as pipeline_on
from benchmarks.mesh.checkpoints import state_of, stepped
from benchmarks.mesh.checkpoints import values as values_of
from benchmarks.mesh.subjects import Batch, built
from tests.harness import Pools
from tests.pipeline.runs import unexamined

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed:UserWarning")


def made(name: str, model: str) -> tuple[stagewise.Pipeline, torch.optim.Optimizer, Batch]:
    """A pipeline, its optimizer, and this rank's part of a batch."""
    pipe, batch = pipeline_on(MESHES[name], model, num_microbatches=2)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.01, momentum=0.9, foreach=False)
    return unexamined(pipe), optimizer, batch


def values(pipe: stagewise.Pipeline) -> dict[str, Any]:
    return values_of(pipe.state_dict())


def saved(folder: str) -> dict[str, Any]:
    """Save one model as plain files under every mesh; train another, save it with its optimizer."""
    found = {}
    for number, name in enumerate(MESHES, 2):
        pipe, _, _ = made(name, "tied")
        with torch.no_grad():
            for parameter in pipe.parameters():
                parameter *= number  # of each mesh its own, and not as built
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
