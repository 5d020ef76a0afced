"""A recipe's plan under the memory and speeds of each device."""

from pathlib import Path

import pytest

from stagewise.errors import PlanError
from stagewise.planning.request import PlanRequest
from stagewise.training.batches import TrainingBatches
from stagewise.training.plans import devices_of, make_plan
from stagewise.training.recipe import build_model, load_recipe

RECIPE = """
import torch
from torch import nn

meta = {meta}

def model():
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))

def data(split):
    return [(torch.ones(8, 32), torch.zeros(8, 32))]

loss = nn.functional.mse_loss

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)
"""


def test_the_cut_follows_memory_and_speeds(tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(meta=False))
    recipe = load_recipe(path)
    model, batch = build_model(recipe, seed=0, meta=False), TrainingBatches(recipe, seed=0).first
    asked = PlanRequest(num_devices=2, num_microbatches=4, memory_bytes=(30e3, 1e6))
    found = make_plan(recipe, model, asked, batch=batch, seconds=0.1)
    assert found.balance[0] <= 3 and found.schedule == "1f1b"  # 8.4 KB of state a layer
    fast = PlanRequest(num_devices=2, num_microbatches=4, speeds=(1, 0.05))
    assert make_plan(recipe, model, fast, batch=batch, seconds=0.1).balance == (7, 1)


def test_named_devices_are_measured_each(tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(meta=False))
    recipe = load_recipe(path)
    model, batch = build_model(recipe, seed=0, meta=False), TrainingBatches(recipe, seed=0).first
    names = ("cpu", "cpu:0")
    asked = PlanRequest(num_devices=2, num_microbatches=4, device_names=names, speeds="measured")
    found = make_plan(recipe, model, asked, batch=batch, seconds=0.1)
    assert len(found.speeds) == 2 and max(found.speeds) == 1
    assert devices_of(asked, 2) == names and devices_of(asked, 1) is None  # one was lost


def test_memory_without_measuring_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(meta=True))
    recipe = load_recipe(path)
    model, batch = build_model(recipe, seed=0, meta=True), TrainingBatches(recipe, seed=0).first
    with pytest.raises(PlanError, match="leave --memory out"):
        make_plan(
            recipe,
            model,
            PlanRequest(num_devices=2, num_microbatches=4, memory_bytes=1e9),
            batch=batch,
        )
