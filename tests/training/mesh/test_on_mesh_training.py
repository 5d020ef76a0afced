"""A recipe trained on a mesh is the recipe trained in one process: losses, metrics, values."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from stagewise.checkpoints.exporting import export_model
from stagewise.mesh import MeshShape
from stagewise.planning import Plan
from stagewise.training import run_folder
from stagewise.training.prepare import TrainOptions
from stagewise.training.recipe import load_recipe
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest
from tests.harness import Pools

RECIPE = """
import torch
from torch import nn

def model():
    block = [nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3)]
    cells = [nn.Linear(5, 6, bias=False), *block, nn.BatchNorm1d(6), nn.Linear(6, 5, bias=False)]
    return nn.Sequential(*cells).double()

def data(split):
    torch.manual_seed(5)
    sizes = (11, 8, 8, 9, 8, 8) if split == "train" else (7, 4)
    return [(torch.randn(n, 5).double(), torch.randn(n, 5).double()) for n in sizes]

def weight(target):
    return target.square().sum()

def loss(output, target):
    return ((output - target) ** 2 * (target**2).sum(1, True)).sum() / weight(target)

def metrics(output, target):
    return {"spread": float((output - target).std())}

def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, foreach=False)

accumulate, clip_grad_norm = 2, 0.3
"""
STEPS = 4


def run(
    recipe: Path, out: Path, balance: tuple[int, ...], microbatches: int, mesh: str | None
) -> str:
    console = Console(file=io.StringIO())
    resumed = out.parent / out.name.removesuffix(" again") if out.name.endswith("again") else None
    options = TrainOptions(
        plan=Plan(balance=balance, schedule="1f1b", num_microbatches=microbatches),
        run=out,
        num_steps=STEPS if resumed else 2,
        validate_every=2,
        checkpoint_every=2,
        resume=run_folder.find(resumed) if resumed else None,
        mesh=None if mesh is None else MeshShape.of(mesh),
    )
    run_training(load_recipe(recipe), options, console=console, stop=StopRequest())
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def on_meshes(recipe: Path, folder: Path) -> None:
    """Sharded over one axis of two pipelines, then resumed on two axes beside one."""
    run(recipe, folder / "mesh", (4, 2), 2, "pp=2,dp_shard=2")
    run(recipe, folder / "mesh again", (6,), 1, "dp_replicate=2,dp_shard=2")


def numbers(run: Path) -> list[float]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [
        number
        for record in records
        for number in (record.get("loss"), record.get("validation_loss"), record.get("metrics"))
        for number in (number.values() if isinstance(number, dict) else [number])
        if number is not None
    ]


@pytest.mark.filterwarnings("ignore:.*torch.distributed:UserWarning")
@pytest.mark.filterwarnings("ignore:BatchNorm layers:UserWarning")
def test_a_recipe_on_a_mesh_is_the_recipe_alone(tmp_path: Path, pools: Pools) -> None:
    """Dropout, weights, running statistics, clipping, accumulation; resumed on another mesh."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    pools[4].run(on_meshes, recipe, tmp_path, seconds=100)
    run(recipe, tmp_path / "one", (6,), 4, None)
    run(recipe, tmp_path / "one again", (6,), 4, None)
    for again in ("", " again"):
        expected = numbers(tmp_path / f"one{again}")
        assert len(expected) == 2 + 2 * 2
        assert numbers(tmp_path / f"mesh{again}") == pytest.approx(expected, rel=1e-11)
    whole = exported(tmp_path / "one again")
    for key, value in exported(tmp_path / "mesh again").items():
        torch.testing.assert_close(value, whole[key], rtol=1e-10, atol=1e-12)


def exported(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    export_model(run_folder.find(run).path, run / "model.safetensors")
    return load_file(run / "model.safetensors")


def test_a_mesh_is_told(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    told = load_recipe(recipe).mesh.in_words(MeshShape.of("pp=2,dp_shard=2,tp=1"))
    assert told == [
        "mesh pp=2,dp_shard=2,tp=1, 4 processes",
        "  dp_shard (2): divides the samples of every batch, and shards parameters, gradients and "
        "optimizer state",
        "  tp (1): each rank has the same part of the batch",
    ]
    assert load_recipe(recipe).mesh.in_words(None) == []
    recipe.write_text(f"{RECIPE}\ndef parallelize(module, mesh, stage_index):\n    pass\n")
    assert "parallelize in " in load_recipe(recipe).mesh.in_words(None)[0]
    recipe.write_text(f"{RECIPE}\ndata_axes = {{'sp': 1}}\n")
    told = load_recipe(recipe).mesh.in_words(MeshShape.of("sp=2"))
    assert told[1:] == [
        "  sp (2): divides dimension 1 of every batch",
        "  metrics and generate are left out: they take whole sequences",
    ]
