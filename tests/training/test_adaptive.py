"""Microbatches that change in a run: what is lost (nothing), and what is told."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from stagewise.costs import CellCost
from stagewise.errors import OutOfMemoryError
from stagewise.planning.plan import Plan
from stagewise.planning.request import PlanRequest
from stagewise.training import plans, run_folder, trainer
from stagewise.training.adaptive import DriftWatch
from stagewise.training.prepare import TrainOptions
from stagewise.training.recipe import Batch, Recipe, load_recipe
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest
from tests.harness import Pools
from tests.recipes import log_of, write_recipe

GREEDY = '''WIDTH = 8

class Greedy(nn.Module):
    """Has memory for LARGEST samples only, from the third batch on."""

    def forward(self, x):
        if self.training and len(x) > LARGEST and x[0, 0] >= 2:
            raise torch.OutOfMemoryError("none left, says the test")
        return x
'''


def greedy(directory: Path, largest: int) -> Path:
    """A recipe with a Greedy cell; each batch tells by its first column which one it is."""
    return write_recipe(
        directory,
        ("WIDTH = 8\n", GREEDY.replace("LARGEST", str(largest))),
        ("nn.Sequential(*layers,", "nn.Sequential(Greedy(), *layers,"),
        ("for _ in range(6):", "for index in range(6):"),
        ("yield inputs,", "inputs[:, 0] = index\n            yield inputs,"),
        name=f"greedy_{largest}.py",
    )


def run(
    recipe: Path,
    out: Path,
    *,
    steps: int = 4,
    resume: Path | None = None,
    adaptive: bool = False,
    **plan: Any,
) -> str:
    options = TrainOptions(
        plan=PlanRequest(**{"num_stages": 2, "num_microbatches": 4, "balance": (4, 7), **plan}),
        adaptive=adaptive,
        run=out,
        num_steps=steps,
        validate_every=5,
        resume=run_folder.find(resume) if resume else None,
    )
    console = Console(file=io.StringIO(), width=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "ADAPTIVE_COUNTS", (2,))
        patch.setattr(plans, "MEASURING_SECONDS", 0.5)
        run_training(load_recipe(recipe), options, console=console, stop=StopRequest())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def changes(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "change" in record]


def test_out_of_memory_raises_the_number_of_microbatches_and_loses_nothing(tmp_path: Path) -> None:
    ample, scarce = greedy(tmp_path, 100), greedy(tmp_path, 1)
    run(ample, tmp_path / "before", steps=2)
    run(ample, tmp_path / "after", steps=6, resume=tmp_path / "before", num_microbatches=8)
    shown = run(scarce, tmp_path / "run", steps=6, adaptive=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "before") + losses(tmp_path / "after")
    (change,) = changes(tmp_path / "run")
    assert change["step"] == 3 and change["change"].startswith("8 microbatches instead of 4")
    assert "rank 0 ran out of memory" in change["reason"] and "stage 0" in change["reason"]
    assert (
        "step 3: 8 microbatches instead of 4: at most 25% of the batch is then in flight" in shown
    )


def test_recomputation_where_more_microbatches_are_no_help(tmp_path: Path) -> None:
    recipe = greedy(tmp_path, 1)
    with pytest.raises(OutOfMemoryError, match="with 8 microbatches and recompute='always'"):
        run(greedy(tmp_path, 0), tmp_path / "hopeless", steps=6, adaptive=True)
    told = [change["change"].split(" ")[0] for change in changes(tmp_path / "hopeless")]
    assert told == ["8", "recomputation:", "recomputation"], "by stage, then in smaller blocks"
    with pytest.raises(OutOfMemoryError, match="train with more microbatches"):
        run(recipe, tmp_path / "fixed", steps=6)  # not asked to adapt
    assert not changes(tmp_path / "fixed")


def test_two_workers_out_of_memory(tmp_path: Path, pools: Pools) -> None:
    """The first one has no memory; both change, and lose nothing."""
    ample, scarce = greedy(tmp_path, 100), greedy(tmp_path, 1)
    split = partial(run, schedule="gpipe")
    split(ample, tmp_path / "before", steps=2)
    rest = {"resume": tmp_path / "before", "num_microbatches": 8, "recompute": "always"}
    split(ample, tmp_path / "after", steps=4, **rest)
    pools[2].run(partial(split, adaptive=True), scarce, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "before") + losses(tmp_path / "after")
    told = [change["change"].split(" ")[0] for change in changes(tmp_path / "run")]
    assert told == ["recomputation:", "8"], "GPipe's microbatches are all in flight"


SLEEPY = '''WIDTH = 8
import time

class Sleepy(nn.Module):
    """Sleeps in forward; on the last stage longer from a later batch on."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        late = SLOW and self.index >= 3 and float(x[0, 0]) >= 4
        time.sleep(0.02 if late else 0.004)
        return x
'''


def sleepy(directory: Path, *, slow: bool) -> Path:
    """A recipe of four cells that sleep, the last of them for longer in the end if `slow`."""
    return write_recipe(
        directory,
        ("WIDTH = 8\n", SLEEPY.replace("SLOW", str(slow))),
        (
            "layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2)) "
            "for _ in range(3)]",
            "layers = [Sleepy(i) for i in range(4)]",
        ),
        ("return 6", "return 40"),
        ("for _ in range(6):", "for index in range(40):"),
        ("yield inputs,", "inputs[:, 0] = index\n            yield inputs,"),
        name=f"sleepy_{slow}.py",
    )


def watched(recipe: Path, out: Path) -> None:
    """A run that looks at every step, adapting only to drift."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOOK_EVERY", 1)
        run(recipe, out, steps=16, adaptive=True, balance=None)


def test_a_device_that_gets_slower_is_replanned_for(tmp_path: Path, pools: Pools) -> None:
    """Cells move away from it, the change is logged, and the losses are those without it."""
    pools[2].run(watched, sleepy(tmp_path, slow=True), tmp_path / "slow", seconds=120)
    told = changes(tmp_path / "slow")
    late = [change for change in told if change["step"] > 4]
    assert any("cells per stage" in change["change"] for change in late), told
    assert all("times the planned seconds" in change["reason"] for change in told)
    run(sleepy(tmp_path, slow=False), tmp_path / "wanted", steps=16, balance=None)
    assert losses(tmp_path / "slow") == losses(tmp_path / "wanted")


def test_the_fastest_measured_number_of_microbatches_is_taken(tmp_path: Path) -> None:
    """By injected costs: halving a microbatch halves its time down to a fixed 2 seconds."""
    recipe, asked = load_recipe(sleepy(tmp_path, slow=False)), []

    def made(
        recipe: Recipe, model: plans.Model, request: PlanRequest, *, batch: Batch, seconds: float
    ) -> Plan:
        count = request.num_microbatches
        assert isinstance(count, int)
        asked.append(count)
        each = max(2.0, 8 / count)
        cell = CellCost(name="cell", forward_seconds=each, backward_seconds=each)
        return Plan(
            balance=(1, 1),
            schedule="1f1b",
            num_microbatches=count,
            cells=(cell, cell),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "make_plan", made)
        request = PlanRequest(num_stages=2, num_microbatches=8)
        batch = torch.ones(8, 8), torch.ones(8, 1)
        plan, measured = plans.measured_choice(recipe, [], request, batch)
    assert asked == [2, 4, 8], "no more than there are samples"
    assert plan.num_microbatches == 4 and list(measured) == asked
    assert measured[8][0].forward_seconds == 2.0


def test_a_watch_forgets_what_it_saw_of_a_plan_that_ran_out_of_memory() -> None:
    cells = tuple(CellCost(name=n, forward_seconds=1, backward_seconds=1) for n in "ab")
    plan = Plan(balance=(1, 1), schedule="1f1b", num_microbatches=4, cells=cells)
    slow = replace(plan, cells=tuple(replace(c, forward_seconds=3) for c in cells)).timeline
    cheap = tuple(replace(c, forward_seconds=0.1, backward_seconds=0.1) for c in cells)
    watch = DriftWatch({2: cheap, 4: cells})
    watch.look(plan, slow)
    watch.look(plan, slow)
    watch.ran_out_of_memory(2)
    assert watch.look(plan, slow) is None and watch.look(plan, slow) is None
    decision = watch.look(plan, slow)
    assert decision is not None and decision.change is None, "2 had no memory"
    assert "the plan stays" in decision.words and decision.drift.factors == (2, 2)
    other = DriftWatch({2: cheap, 4: cells})
    assert [other.look(plan, slow) for _ in range(2)] == [None, None]
    found = other.look(plan, slow)
    assert found is not None and found.change is not None
    assert found.words == "microbatches 2 instead of 4"
    assert found.change.plan.cells[0].forward_seconds == 0.2, "scaled by what drifted"


def test_a_resumed_run_keeps_its_number_of_microbatches(tmp_path: Path) -> None:
    """Dropout depends on it, so measuring anew would make it another run."""
    recipe = write_recipe(tmp_path)
    few = {"balance": (4, 6), "num_microbatches": 3}
    run(recipe, tmp_path / "whole", **few)
    run(recipe, tmp_path / "parts", steps=2, **few)
    assert run_folder.find(tmp_path / "parts").num_microbatches == 3
    run(recipe, tmp_path / "parts", resume=tmp_path / "parts", adaptive=True, balance=(4, 6))
    losses = [
        [r["loss"] for r in log_of(tmp_path / name) if "loss" in r] for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
