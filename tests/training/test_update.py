"""What a recipe says of precision, accumulation and losses: the plain loop's numbers, logged."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import stagewise
from stagewise.errors import RecipeError
from stagewise.planning.request import PlanRequest
from stagewise.training import run_folder
from stagewise.training.prepare import TrainOptions
from stagewise.training.recipe import Recipe, build_model, load_recipe
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest

RECIPE = """
import torch, stagewise
from torch import nn

class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        stagewise.add_loss(y.square().mean(), "balance")
        return y

def model():
    cells = [nn.Linear(4, 4), nn.Tanh(), Router(4, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*cells).to(DTYPE)

def data(split):
    generator = torch.Generator().manual_seed(3)
    sizes = (5, 7, 4, 6, 8, 3) if split == "train" else (4, 6)
    batches = [(torch.randn(n, 4, generator=generator).to(DTYPE),
                torch.randint(-1, 3, (n,), generator=generator)) for n in sizes]
    return [(x, torch.where(torch.arange(len(y)) < 2, 1, y)) for x, y in batches]

def loss(output, target):
    nll = nn.functional.cross_entropy(output, target, ignore_index=-1)
    return {"nll": nll, "size": output.square().mean()}

def weight(target):
    return {"nll": (target >= 0).sum()}

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
"""


def recipe_of(directory: Path, *lines: str, dtype: str = "torch.float64") -> Recipe:
    text = RECIPE.replace("DTYPE", dtype)
    path = directory / "tiny.py"
    path.write_text(text + "\n" + "\n".join(lines))
    return load_recipe(path)


def run(
    recipe: Recipe, out: Path, *, steps: int | None = None, stages: int = 2, resume: bool = False
) -> tuple[list[dict[str, object]], str]:
    """The log's records, and what was shown."""
    console = Console(file=io.StringIO(), width=200)
    options = TrainOptions(
        plan=PlanRequest(num_stages=stages, num_microbatches=3),
        run=out,
        num_steps=steps,
        resume=run_folder.find(out) if resume else None,
    )
    run_training(recipe, options, console=console, stop=StopRequest())
    assert isinstance(console.file, io.StringIO)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return records, console.file.getvalue()


def plain(recipe: Recipe, num_steps: int) -> list[dict[str, float]]:
    """The losses by name of each step of the plain loop."""
    model = build_model(recipe, seed=0)
    assert isinstance(model, nn.Module)
    optimizer = recipe.optimizer([*model.parameters()])
    batches = iter([*recipe.data("train")] * 9)  # type: ignore[misc]
    rows = []
    for _ in range(num_steps):
        parts = [next(batches) for _ in range(recipe.accumulate)]
        inputs, target = (torch.cat(column) for column in zip(*parts, strict=True))
        optimizer.zero_grad()
        with stagewise.collect_losses() as added:
            losses = dict(recipe.loss(model(inputs), target))  # type: ignore[arg-type]
        losses |= added
        torch.stack([*losses.values()]).sum().backward()
        if recipe.clip_grad_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), recipe.clip_grad_value)
        if recipe.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
        optimizer.step()
        rows.append({name: float(loss.detach()) for name, loss in losses.items()})
    return rows


@pytest.mark.parametrize("lines", [(), ("accumulate = 3", "clip_grad_value = 0.05")])
def test_accumulated_ragged_batches_are_one_minibatch(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    """Two losses of different weights, and one that a cell adds."""
    recipe = recipe_of(tmp_path, "clip_grad_norm = 0.4", *lines)
    records, shown = run(recipe, tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 6 // recipe.accumulate
    wanted = plain(recipe, len(steps))
    for record, losses in zip(steps, wanted, strict=True):
        assert record["losses"] == pytest.approx(losses, rel=1e-10)
        assert record["loss"] == pytest.approx(sum(losses.values()), rel=1e-10)
    last = steps[-1]["losses"]
    assert isinstance(last, dict)
    text = ", ".join(f"{name} {last[name]:.4f}" for name in ("nll", "size", "balance"))
    assert f"loss {steps[-1]['loss']:.4f} ({text})" in shown


def test_validation_weighs_every_loss_by_its_own_weight(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    records, shown = run(recipe, tmp_path / "run", steps=1)
    found = next(record for record in records if "validation_loss" in record)["losses"]
    model = build_model(recipe, seed=0)
    validation = recipe.data("validation")
    assert isinstance(model, nn.Module) and validation is not None
    inputs, target = (torch.cat(column) for column in zip(*validation, strict=True))
    losses = recipe.loss(model(inputs), target)
    assert isinstance(losses, dict) and isinstance(found, dict)
    for name, value in losses.items():
        assert found[name] == pytest.approx(float(value.detach()), rel=1e-10)
    assert f"(nll {found['nll']:.4f}, size {found['size']:.4f}, balance" in shown


def test_autocast_and_an_overflow_that_skips_the_step(tmp_path: Path) -> None:
    """The first scales are infinite in float16; the scaler halves them until gradients fit."""
    recipe = recipe_of(
        tmp_path,
        "autocast = torch.float16",
        "grad_scaler = {'init_scale': 2.0**20, 'growth_interval': 4}",
        "accumulate = 2",
        dtype="torch.float32",
    )
    records, _ = run(recipe, tmp_path / "run", steps=9)
    steps = [record for record in records if "loss" in record]
    scales = [record["loss_scale"] for record in steps]
    assert scales[:2] == [2.0**20, 2.0**19]
    seen = [record["losses"] for record in steps]
    assert seen[0] != seen[1]  # other batches
    assert steps[-1]["loss"] < steps[0]["loss"]  # type: ignore[operator]
    # A pause changes nothing: the scale is in the checkpoint.
    run(recipe, tmp_path / "parts", steps=4)
    again, _ = run(recipe, tmp_path / "parts", steps=9, stages=3, resume=True)
    parts = [record for record in again if "loss" in record]
    for key in ("loss", "losses", "loss_scale"):
        assert [record[key] for record in parts] == [record[key] for record in steps]


def test_a_scaler_is_on_by_itself_under_float16_alone(tmp_path: Path) -> None:
    for dtype, number in (("bfloat16", None), ("float16", 2.0**16)):
        recipe = recipe_of(tmp_path, f"autocast = torch.{dtype}", dtype="torch.float32")
        records, _ = run(recipe, tmp_path / dtype, steps=1)
        assert [r.get("loss_scale") for r in records if "loss" in r] == [number]
        half = records[1]["loss"]
        with recipe.precision():
            assert torch.get_autocast_dtype("cpu") is getattr(torch, dtype)
        single = recipe_of(tmp_path, dtype="torch.float32")
        full = run(single, tmp_path / f"not {dtype}", steps=1)[0][1]["loss"]
        assert half != full and half == pytest.approx(full, rel=0.05)


def test_autocast_is_that_of_the_machines_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    @contextmanager
    def autocast(kind: str, dtype: torch.dtype) -> Iterator[None]:
        entered.append(kind)
        yield

    recipe = recipe_of(tmp_path, "autocast = torch.bfloat16", dtype="torch.float32")
    monkeypatch.setattr(torch, "autocast", autocast)
    for here in (None, torch.device("xpu")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda here=here, **_: here)
        with recipe.precision():
            pass
    assert entered == ["cpu", "cpu", "xpu"]


def test_sums_in_float32_reach_the_pipeline(tmp_path: Path) -> None:
    results = []
    for line in ("", "accumulate_in_float32 = True"):
        recipe = recipe_of(tmp_path, line, "accumulate = 3", dtype="torch.bfloat16")
        records, _ = run(recipe, tmp_path / f"run{line}", steps=4)
        results.append([r["loss"] for r in records if "loss" in r])
    assert results[0][0] == results[1][0] and results[0] != results[1]


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        ("clip_grad_value = -1", r"a positive number, the maximum absolute value"),
        ("clip_grad_norm = True", r"a positive number, the maximum norm"),
        ("accumulate = 0", r"a positive integer: how many batches"),
        ("accumulate = 2.0", r"a positive integer"),
        ("autocast = 'bf16'", r"torch\.bfloat16 or torch\.float16"),
        ("autocast = torch.float32", r"torch\.bfloat16 or torch\.float16"),
        ("grad_scaler = True", r"a dict of options of torch\.amp\.GradScaler"),
        ("grad_scaler = {'scale': 2.0}", r"a dict of options of torch\.amp\.GradScaler"),
        ("accumulate_in_float32 = 1", r"True, to sum gradients"),
        ("batch_dim = True", r"an integer: the dimension"),
        ("loss_reduction = 'none'", r"'mean' or 'sum'"),
    ],
)
def test_nonsense_is_found_when_the_recipe_is_loaded(
    tmp_path: Path, line: str, needed: str
) -> None:
    name = line.split()[0]
    with pytest.raises(RecipeError, match=rf"{name} in .* is .*; it must be {needed}"):
        recipe_of(tmp_path, line)


TIME_FIRST = """
import torch
from torch import nn
batch_dim = 1
loss_reduction = "sum"
accumulate = 2

class Last(nn.Module):
    def forward(self, x):
        return x.cumsum(0)

def model():
    return nn.Sequential(nn.Linear(4, 4), Last(), nn.Linear(4, 2)).double()

def data(split):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 11, 4, generator=generator).double()
    return [(part, part[..., :2]) for part in x.split([4, 5, 2], 1)]

def loss(output, target):
    return (output - target).square().sum()

def metrics(output, target):
    return {"error": float((output - target).abs().mean())}

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.001)
"""


def test_samples_along_another_dimension_and_sums(tmp_path: Path) -> None:
    path = tmp_path / "time.py"
    path.write_text(TIME_FIRST + "\nclip_grad_norm = 1e9\n")
    recipe = load_recipe(path)
    records, _ = run(recipe, tmp_path / "out", steps=1)
    model, data = build_model(recipe, seed=0), [*(recipe.data("train") or ())]
    assert isinstance(model, nn.Module)
    losses = [recipe.loss(model(x), y) for x, y in data]
    plain = [float(loss.detach()) for loss in losses]  # type: ignore[union-attr]
    torch.autograd.backward(losses[:2])
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    validation, step = records[0], records[1]
    assert step["loss"] == pytest.approx(sum(plain[:2]))
    assert step["gradient_norm"] == pytest.approx(float(norm), rel=1e-6)
    assert validation["validation_loss"] == pytest.approx(sum(plain))


def test_the_log_has_the_learning_rate_of_every_step(tmp_path: Path) -> None:
    halves = "def scheduler(o): return torch.optim.lr_scheduler.ExponentialLR(o, 0.5)"
    records, _ = run(recipe_of(tmp_path, halves), tmp_path / "run", steps=3)
    rates = [record["learning_rate"] for record in records if "loss" in record]
    assert rates == [rates[0], rates[0] / 2, rates[0] / 4]  # type: ignore[operator]
