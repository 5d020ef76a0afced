"""A run that was stopped at any step, and resumed, is the run that never was."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from stagewise.checkpoints.untrusted import Planner, Reader
from stagewise.planning import Plan
from stagewise.training import run_folder
from stagewise.training.prepare import TrainOptions
from stagewise.training.recipe import load_recipe
from stagewise.training.state.plain_values import from_bytes
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest
from tests.harness import Pools

RECIPE = """
import random
import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x) + x

def model():
    cells = [Part(), nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(4), Part(), nn.Dropout(0.1)]
    return nn.Sequential(*cells, nn.Linear(4, 1))

def batch(number):
    x = torch.randn(8, 4) * random.random() + float(np.random.rand()) + number / 10
    return x, x.sum(1, keepdim=True)

class Data:
    def __len__(self):
        return 5

    def __iter__(self):
        order = torch.randperm(5).tolist()
        random.shuffle(order)
        return map(batch, order)

class StatefulData:
    '''As torchdata's StatefulDataLoader: its state is what it has yielded.'''

    def __init__(self):
        self.position, self.finished, self.order = 0, False, np.random.permutation(5)

    def __len__(self):
        return 5

    def __iter__(self):
        if self.finished:
            self.position, self.finished, self.order = 0, False, np.random.permutation(5)
        return self

    def __next__(self):
        self.finished = self.position == 5
        if self.finished:
            raise StopIteration
        self.position += 1
        return batch(int(self.order[self.position - 1]))

    def state_dict(self):
        return {"position": self.position, "order": self.order, "finished": self.finished}

    def load_state_dict(self, state):
        self.position, self.order = state["position"], state["order"]
        self.finished = state["finished"]

def data(split):
    if split == "train":
        return DATA()
    return [(torch.ones(4, 4), torch.ones(4, 1))]

def loss(output, target):
    return nn.functional.mse_loss(output, target + 0.01 * torch.randn_like(target))

def metrics(output, target):
    return {"random": float(torch.rand(()) + random.random())}

def optimizer(parameters):
    made = OPTIMIZER
    def add_noise(*_):
        with torch.no_grad():
            for p in parameters:
                p.add_(NOISE * torch.randn_like(p), alpha=random.random())
    made.register_step_post_hook(add_noise)
    return made
"""

SCHEDULE = """
def scheduler(optimizer):
    lr = torch.optim.lr_scheduler
    return lr.SequentialLR(optimizer, [lr.LinearLR(optimizer, 0.1, 1.0, 2),
                                       lr.CosineAnnealingLR(optimizer, 9)], [2])
"""
AVERAGES = """
class Norms:
    '''Counts by rank, and keeps a list, an array and integer keys.'''
    def __init__(self, module):
        self.seen, self.module, self.log = {0: 0}, module, []

    def update_parameters(self, module):
        self.seen[0] += 1
        self.log.append(np.array([sum(float(p.sum()) for p in module.parameters())]))

    def state_dict(self):
        named = self.module.named_parameters()
        by_name = {n: {"sum": p.sum(), 3: float(p.sum())} for n, p in named}
        return {"seen": self.seen, "log": self.log, "empty": {}, "by_name": by_name}

    def load_state_dict(self, state):
        assert state["empty"] == {}
        for n, p in self.module.named_parameters():
            assert state["by_name"][n] == {"sum": p.sum(), 3: float(p.sum())}
        self.seen, self.log = state["seen"], state["log"]

def state(module):
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return {"ema": ema, "norms": Norms(module)}
"""
ADAMW, MOMENTUM = (
    "torch.optim.AdamW([{'params': [p for p in parameters if p.dim() > 1], 'lr': 0.02},"
    "{'params': [p for p in parameters if p.dim() == 1]}, {'params': [], 'weight_decay': 0}])",
    "torch.optim.SGD(parameters, lr=torch.tensor(0.05), momentum=0.9)",
)
CASES = {
    "data": ("Data", ADAMW, "0.01", ""),
    "a stateful loader, accumulated": ("StatefulData", MOMENTUM, "0.01", "accumulate = 2"),
    "schedule and averages": ("Data", ADAMW, "0", SCHEDULE + AVERAGES),
    "scaler, clipping": (
        "StatefulData",
        ADAMW,
        "0",
        "autocast = torch.float16\nclip_grad_norm = 1.0\n"
        "grad_scaler = {'init_scale': 2.0**12, 'growth_interval': 1}" + SCHEDULE,
    ),
}
STEPS = 7


def recipe_of(folder: Path, case: str) -> Path:
    data, optimizer, noise, more = CASES[case]
    text = RECIPE.replace("DATA", data).replace("OPTIMIZER", optimizer).replace("NOISE", noise)
    path = folder / "recipe.py"
    path.write_text(f"{text}\n{more}\n")
    return path


def run(recipe: Path, out: Path, balance: tuple[int, ...], resume: Path | None = None) -> None:
    options = TrainOptions(
        plan=Plan(balance=balance, schedule="1f1b", num_microbatches=2),
        run=out,
        num_steps=STEPS,
        validate_every=2,
        checkpoint_every=0 if resume else 1,
        keep=STEPS,
        resume=run_folder.find(resume) if resume else None,
    )
    console = Console(file=io.StringIO())
    run_training(load_recipe(recipe), options, console=console, stop=StopRequest())


def contents(checkpoint: Path) -> dict[str, Any]:
    """Every entry of a checkpoint."""
    reader = Reader(checkpoint)
    tensors = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in reader.read_metadata().state_dict_metadata.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):
        load(tensors, storage_reader=reader, planner=Planner(), no_dist=True)
    values = {n: from_bytes(t) for n, t in tensors.items() if t.dtype == torch.uint8}
    for part in values.get("schedule.state", {}).get("_schedulers", ()):
        del part["_last_lr"]  # only shown; a part that is not in use shows the rate in use
    plain = {name: str(value) for name, value in values.items()}
    return {**tensors, **plain, "scaler": run_folder.find(checkpoint).scaler}


def differing(one: Path, other: Path) -> list[str]:
    a, b = contents(run_folder.folder_of(one, STEPS)), contents(run_folder.folder_of(other, STEPS))
    assert a.keys() == b.keys()
    tensors = {name for name, value in a.items() if isinstance(value, torch.Tensor)}
    return [n for n in a if not (torch.equal(a[n], b[n]) if n in tensors else a[n] == b[n])]


def losses(run: Path, after: int) -> list[object]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [
        (r["step"], r["loss"], r.get("loss_scale"))
        for r in records
        if "loss" in r and r["step"] > after
    ]


@pytest.mark.parametrize("case", CASES)
def test_resumed_at_any_step(tmp_path: Path, case: str) -> None:
    recipe, whole = recipe_of(tmp_path, case), tmp_path / "whole"
    run(recipe, whole, (3, 4))
    for step in range(1, STEPS):
        out = tmp_path / f"{step}"
        run(recipe, out, (3, 4), resume=run_folder.folder_of(whole, step))
        assert losses(out, step) == losses(whole, step), step
        assert differing(whole, out) == [], step


def on_ranks(recipe: Path, whole: Path, out: Path, balance: tuple[int, ...]) -> None:
    run(recipe, whole, balance)
    run(recipe, out, balance, resume=run_folder.folder_of(whole, 3))


@pytest.mark.parametrize(
    "case, balance",
    [
        ("a stateful loader, accumulated", (3, 4)),
        ("schedule and averages", (3, 4)),
        ("schedule and averages", (1, 1, 5)),  # no parameters in the middle
    ],
)
def test_resumed_on_ranks_and_at_another_number_of_them(
    tmp_path: Path, pools: Pools, case: str, balance: tuple[int, ...]
) -> None:
    """Every rank draws its own noise, so another number of them has other numbers only then."""
    recipe, whole = recipe_of(tmp_path, case), tmp_path / "whole"
    pools[len(balance)].run(on_ranks, recipe, whole, tmp_path / "again", balance)
    assert losses(tmp_path / "again", 3) == losses(whole, 3)
    assert differing(whole, tmp_path / "again") == []
    if CASES[case][2] == "0":
        run(recipe, tmp_path / "one", (1, 2, 4), resume=run_folder.folder_of(whole, 3))
        assert losses(tmp_path / "one", 3) == losses(whole, 3)
