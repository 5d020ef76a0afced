"""Several optimizers, sets and modes, and a callback: the same at K=1 and K=2, and resumed."""

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
from stagewise.training.prepare import TrainOptions
from stagewise.training.recipe import load_recipe
from stagewise.training.recipe_costs import state_factor
from stagewise.training.state.optimizers import SeveralOptimizers, empty_lists_allowed
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest
from tests.harness import Pools

RECIPE = '''
import torch
from torch import nn

class ScheduleFree(torch.optim.Optimizer):
    """SGD as in the package schedulefree: other weights in training than in evaluation."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.05, "beta": 0.9, "k": 0, "trains": False})

    def train(self):
        self._move(True, lambda group: 1 - group["beta"])

    def eval(self):
        self._move(False, lambda group: 1 - 1 / group["beta"])

    def _move(self, trains, weight):
        for group in self.param_groups:
            if group["trains"] != trains:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight(group))
            group["trains"] = trains

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["trains"]
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"])
                p.sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - 1 / group["k"])))
                z.sub_(p.grad, alpha=group["lr"])

def model():
    matrix = nn.Linear(8, 8, bias=False)
    cells = [nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), matrix, nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*cells[:2], matrix, nn.Tanh(), cells[2], cells[5]).double()

def data(split):
    generator = torch.Generator().manual_seed(len(split))
    x = torch.randn(5, 8, 6, generator=generator, dtype=torch.float64)
    batches = [(each, each[:, :2].sin()) for each in x]
    return batches if split == "train" else {"near": batches[:2], "far": batches[2:3]}

def loss(output, target):
    return nn.functional.mse_loss(output, target)

def metrics(output, target):
    error = (output - target).abs()
    return {"mean": error.mean(), "max": error.max()}

def optimizer(parameters):
    matrices = [p for p in parameters if p.dim() == 2]
    return [torch.optim.Muon(matrices, lr=0.01), ScheduleFree([p for p in parameters if p.dim() < 2])]

HEARD = []

def callback(record):
    HEARD.append(record["step"])
    return "loss" in record and record["step"] == 5
'''  # noqa: E501


def run(recipe: Path, out: Path, balance: tuple[int, ...], resume: Path | None = None) -> list[int]:
    options = TrainOptions(
        plan=Plan(balance=balance, num_microbatches=4),
        run=out,
        num_steps=50,
        validate_every=2,
        checkpoint_every=1,
        keep=9,
        resume=None if resume is None else run_folder.find(resume),
    )
    loaded = load_recipe(recipe)
    console = Console(file=io.StringIO())
    outcome = run_training(loaded, options, console=console, stop=StopRequest())
    assert not outcome.stopped and outcome.last_step == 5
    assert loaded.callback is not None
    heard: list[int] = loaded.callback.__globals__["HEARD"]
    return heard


def both(recipe: Path, root: Path, balance: tuple[int, ...]) -> list[int]:
    heard = run(recipe, root / "whole", balance)
    run(recipe, root / "again", balance, run_folder.folder_of(root / "whole", 3))
    return heard


def log_of(run: Path) -> dict[tuple[int, str], Any]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    names = "loss", "validation_loss", "metrics"
    return {(r["step"], name): r[name] for r in records for name in names if name in r}


def test_the_same_on_one_and_two_ranks_and_resumed(tmp_path: Path, pools: Pools) -> None:
    recipe = tmp_path / "several.py"
    recipe.write_text(RECIPE)
    one, two = tmp_path / "1", tmp_path / "2"
    assert both(recipe, one, (6,)) == [0, 1, 2, 2, 3, 4, 4, 5]
    assert pools[2].run(both, recipe, two, (4, 2)) == [[0, 1, 2, 2, 3, 4, 4, 5]] * 2
    whole = log_of(one / "whole")
    assert whole == log_of(two / "whole")
    assert whole[5, "loss"] < whole[1, "loss"]
    sets = {f"{name}/{value}" for name in ("near", "far") for value in ("loss", "mean", "max")}
    assert whole[4, "metrics"].keys() == sets
    assert whole[4, "validation_loss"] == whole[4, "metrics"]["near/loss"]
    for root in (one, two):
        again = log_of(root / "again")
        assert {key: again[key] for key in again if key[0] > 3} == {
            key: whole[key] for key in whole if key[0] > 3
        }


def test_several_optimizers_are_each_of_them() -> None:
    def parameters() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))]

    (matrix, vector), (plain_matrix, plain_vector) = parameters(), parameters()
    together = SeveralOptimizers(
        [torch.optim.SGD([matrix], 0.1, 0.9), torch.optim.AdamW([vector], 0.2)]
    )
    apart = [torch.optim.SGD([plain_matrix], 0.1, 0.9), torch.optim.AdamW([plain_vector], 0.2)]
    schedule = torch.optim.lr_scheduler.StepLR(together, 1, 0.5)
    plain_schedules = [torch.optim.lr_scheduler.StepLR(one, 1, 0.5) for one in apart]
    for number in range(4):
        for p in (matrix, vector, plain_matrix, plain_vector):
            p.grad = p.detach() * (number + 1)
        together.step()
        for one in (*apart, schedule, *plain_schedules):
            one.step()
        if number == 1:
            state = together.state_dict()
            fresh = torch.optim.SGD([matrix], 0.1, 0.9), torch.optim.AdamW([vector], 0.2)
            together = SeveralOptimizers(fresh)
            together.load_state_dict(state)
            schedule.optimizer = together
    assert torch.equal(matrix, plain_matrix) and torch.equal(vector, plain_vector)


def test_optimizers_of_nothing_are_made_where_a_recipe_makes_them(tmp_path: Path) -> None:
    with empty_lists_allowed():
        assert torch.optim.Muon([]).param_groups[0]["params"] == []
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD([])
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.replace("return [torch", "return [3, torch"))
    with pytest.raises(RecipeError, match="returned a list; it must return a torch"):
        load_recipe(path).make_optimizer([nn.Parameter(torch.ones(2))])
    path.write_text(RECIPE)
    vectors = load_recipe(path).make_optimizer([nn.Parameter(torch.ones(2))])
    assert vectors is not None  # the one for matrices has none here
    assert [len(group["params"]) for group in vectors.param_groups] == [0, 1]
    chain = [type("Cell", (), {"module": nn.Linear(2, 2)})]
    assert state_factor(load_recipe(path), chain) == 3.0  # type: ignore[arg-type]
