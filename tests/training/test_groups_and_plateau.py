"""Groups by parameters' names, and a schedule that waits for a metric: as in a plain loop, at K=1
and K=2, and resumed.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from stagewise.errors import RecipeError
from stagewise.planning import Plan
from stagewise.training import run_folder
from stagewise.training.metrics.progress import ValidationRecord
from stagewise.training.prepare import TrainOptions, check_form
from stagewise.training.recipe import load_recipe
from stagewise.training.state.optimizers import grouped
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest
from tests.harness import Pools

RECIPE = """
import torch
from torch import nn

def model():
    cells = [nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2, bias=False)]
    return nn.Sequential(*cells).double()

def data(split):
    x = torch.randn(7, 8, 6, generator=torch.Generator().manual_seed(0)).double()
    batches = [(each, each[:, :2].sin()) for each in x]
    return batches[:5] if split == "train" else batches[5:]

def loss(output, target):
    return nn.functional.mse_loss(output, target)

def metrics(output, target):
    return {"error": (output - target).abs().max(), "zero": 0.0}

groups = {"*.bias": {"weight_decay": 0.0, "lr": 0.1}, "2.*": {"weight_decay": 0.5}}

def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.05)

scheduler_metric = "METRIC"

def scheduler(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, 1, min_lr=[0.03, 0, 0])
"""
STEPS = 9


def recipe_of(folder: Path, metric: str = "zero", more: str = "") -> Path:
    path = folder / "recipe.py"
    path.write_text(RECIPE.replace("METRIC", metric) + more)
    return path


def run(
    recipe: Path, out: Path, balance: tuple[int, ...], resume: Path | None = None, every: int = 1
) -> list[dict[str, Any]]:
    options = TrainOptions(
        plan=Plan(balance=balance, num_microbatches=4),
        run=out,
        num_steps=STEPS,
        validate_every=every,
        checkpoint_every=1,
        keep=9,
        resume=None if resume is None else run_folder.find(resume),
    )
    console = Console(file=io.StringIO())
    run_training(load_recipe(recipe), options, console=console, stop=StopRequest())
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def both(recipe: Path, root: Path, balance: tuple[int, ...]) -> list[list[dict[str, Any]]]:
    whole = run(recipe, root / "whole", balance)
    return [whole, run(recipe, root / "again", balance, run_folder.folder_of(root / "whole", 4))]


def plain(recipe: Path) -> list[tuple[float, float]]:
    """The losses and rates of a plain loop."""
    loaded = load_recipe(recipe)
    torch.manual_seed(0)
    model: Any = loaded.model()
    names = [name for name, _ in model.named_parameters()]
    groups = grouped([*model.parameters()], names, loaded.groups)
    optimizer: Any = loaded.optimizer(groups)  # type: ignore[arg-type]
    assert loaded.scheduler is not None
    scheduler: Any = loaded.scheduler(optimizer)
    train: Any = [*(loaded.data("train") or ())]
    found = []
    for step in range(STEPS):
        x, target = train[step % len(train)]
        optimizer.zero_grad()
        loss: Any = loaded.loss(model(x), target)
        loss.backward()
        found.append((float(loss.detach()), optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step(0.0)
    return found


def test_as_in_a_plain_loop_at_one_and_two_ranks_and_resumed(tmp_path: Path, pools: Pools) -> None:
    recipe = recipe_of(tmp_path)
    expected = plain(recipe)
    assert len({rate for _, rate in expected}) == 3  # 0.1, halved, and its least of 0.03
    found = both(recipe, tmp_path / "1", (5,)), *pools[2].run(both, recipe, tmp_path / "2", (2, 3))
    for whole, again in found:
        steps = [(r["loss"], r["learning_rate"]) for r in whole if "loss" in r]
        for (loss, rate), (plain_loss, plain_rate) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(plain_loss, rel=1e-9) and rate == plain_rate
        assert [r["loss"] for r in again if "loss" in r] == [loss for loss, _ in steps[4:]]


def test_groups_are_all_there_in_order_on_every_rank() -> None:
    here = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    made = grouped(here, ["a.bias", "b.w", "a.w"], {"a.*": {"lr": 1}, "*.bias": {"lr": 2}, "c": {}})
    assert [[id(p) for p in group["params"]] for group in made] == [
        [id(here[0]), id(here[2])],
        [],
        [],
        [id(here[1])],
    ]
    assert [group.get("lr") for group in made] == [1, 2, None, None]
    assert [len(group["params"]) for group in grouped(here, (), {"*": {}})] == [3, 0]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("bias", "'bias' matches no parameter; the model's are called 0.weight, 0.bias, 2.weight"),
        ("0.bias", "'0.bias' only matches what patterns before it do"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_before_workers_start(
    tmp_path: Path, pattern: str, message: str
) -> None:
    more = f"groups = {{'*.bias': {{}}, {pattern!r}: {{}}}}"
    with pytest.raises(RecipeError, match=message):
        check_form(
            load_recipe(recipe_of(tmp_path, more=more)), Plan(balance=(5,), num_microbatches=1)
        )


def test_a_group_that_names_its_own_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="without 'params', which the patterns tell"):
        load_recipe(recipe_of(tmp_path, more="groups = {'*.bias': {'params': []}}"))


def test_a_schedule_that_would_wait_for_ever_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="after every due validation, but there is none: let dat"):
        run(recipe_of(tmp_path), tmp_path / "run", (5,), every=0)
    recipe = recipe_of(tmp_path, metric="accuracy")
    with pytest.raises(RecipeError, match="is 'accuracy', but validation has error, zero; give"):
        run(recipe, tmp_path / "named", (5,))
    assert '"loss"' not in (tmp_path / "named" / "log.jsonl").read_text()
    record = ValidationRecord(step=1, validation_loss=3.0, metrics={"a": 2.0}, losses={"b": 1.0})
    assert [record.named(name) for name in ("", "a", "b")] == [3.0, 2.0, 1.0]
