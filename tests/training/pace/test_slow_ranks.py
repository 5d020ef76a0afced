"""A run is planned around a rank that has become slow, and is otherwise as it would have been."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from torch import nn

from stagewise.costs import CellCost
from stagewise.mesh import MeshShape
from stagewise.planning.plan import Plan, plan_for
from stagewise.planning.request import PlanRequest
from stagewise.timeline import Timeline
from stagewise.training import trainer
from stagewise.training.metrics.progress import ChangeRecord
from stagewise.training.pace.slow_ranks import SlowRanks
from stagewise.training.prepare import Trained, TrainOptions
from stagewise.training.recipe import load_recipe
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest
from tests.harness import Pools
from tests.recipes import log_of, write_recipe

CELLS = tuple(CellCost(name=n, forward_seconds=1, backward_seconds=2) for n in "abcdef")
ASKED = PlanRequest(num_stages=2, num_microbatches=4)
SEARCHED = PlanRequest(num_devices=2, num_microbatches=4, memory_bytes=1e15)
FOUND = Plan(
    balance=(3, 3), schedule="1f1b", num_microbatches=4, cells=CELLS, measured_seconds=20.0
)


def trained_with(plan: Plan) -> Trained:
    """As far as it is looked at."""
    ranks = SimpleNamespace(gather=lambda value, what: ["rank 0 on a", "rank 1 on b"])
    pipe = SimpleNamespace(
        plan=plan,
        num_ranks=2,
        ranks=ranks,
        module=nn.Linear(1, 1),
        device=SimpleNamespace(type="cpu"),
    )
    return cast(Trained, SimpleNamespace(pipe=pipe, optimizer=None))


class Run:
    """A run that looks at every step."""

    def __init__(self, asked: PlanRequest | Plan, plan: Plan, **options: Any) -> None:
        self.slow_ranks = SlowRanks(TrainOptions(plan=asked, run=Path("run"), **options))
        self.plan, self.step = plan, 0
        self.slow_ranks.use(trained_with(plan))

    def looks(self, *speeds: float) -> list[ChangeRecord]:
        """Return what is told of looks at devices of these speeds, the second one's."""
        told = []
        for speed in speeds:
            self.step += 1
            records, plan = self.slow_ranks.look(self.step, self.timeline(speed))
            told += records
            if plan is not None:
                self.plan = plan
                self.slow_ranks.use(trained_with(plan))
        return told

    def timeline(self, speed: float) -> Timeline:
        return replace(self.plan, cells=CELLS, speeds=(1.0, speed)).timeline


@pytest.mark.parametrize("asked", [ASKED, SEARCHED, FOUND], ids=["cut", "search", "plan searched"])
def test_cells_move_away_from_a_slow_rank_and_back(asked: PlanRequest | Plan) -> None:
    """The plan of `stagewise plan` is searched for anew, which also tries other schedules."""
    usual = FOUND if asked is FOUND else plan_for(ASKED, CELLS)
    run = Run(asked, usual)
    pace, change = run.looks(1, 1, 1, 0.2, 0.2)
    assert pace.change == "rank 1 on b has become slow"
    assert "cells per stage [5, 1] instead of [3, 3]" in change.change
    assert change.reason == "rank 1 on b takes 5.0 times as long as usual"
    slow = replace(usual, speeds=(1.0, 0.2)).timeline.duration_seconds
    assert change.predicted_gain == pytest.approx(1 - run.plan.timeline.duration_seconds / slow)
    assert change.predicted_gain > 0.4 and run.plan.num_microbatches == 4
    assert run.looks(0.2, 0.2, 0.2) == []
    pace, change = run.looks(1, 1, 1)
    assert pace.change == "rank 1 on b is no longer slow"
    assert change.reason == "all ranks are as fast as usual again"
    assert run.plan == usual


def test_a_slow_rank_that_becomes_slower_is_planned_around_again() -> None:
    run = Run(ASKED, plan_for(ASKED, CELLS))
    assert "[4, 2] instead of [3, 3]" in run.looks(1, 1, 1, 0.4, 0.4, 0.4)[1].change
    assert run.looks(0.1, 0.4, 0.3, 0.1, 0.5) == []  # noise: never at two looks together
    [change] = run.looks(0.1, 0.1)
    assert "[5, 1] instead of [4, 2]" in change.change
    assert change.reason == "rank 1 on b takes 10.0 times as long as usual"


@pytest.mark.parametrize(
    ("asked", "plan", "options", "why"),
    [
        (ASKED, Plan(balance=(1, 1), num_microbatches=4, cells=CELLS[:2]), {}, "no other is"),
        (replace(ASKED, balance=(3, 3)), FOUND, {}, "its cut was given"),
        (replace(FOUND, measured_seconds=None), FOUND, {}, "its cut was given"),
        (ASKED, FOUND, {"replace": 1}, "--replace-lost needs it"),
        (ASKED, FOUND, {"mesh": MeshShape.of("pp=2,dp_shard=2")}, "on a mesh"),
    ],
    ids=["nothing helps", "--balance", "--plan", "--replace-lost", "--mesh"],
)
def test_where_the_plan_stays_it_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    asked: PlanRequest | Plan,
    plan: Plan,
    options: dict[str, Any],
    why: str,
) -> None:
    monkeypatch.setattr(Run, "timeline", lambda run, s: replace(run.plan, speeds=(1.0, s)).timeline)
    run = Run(asked, plan, **options)
    told = run.looks(1, 1, 1, 0.2, 0.2, 0.2, 0.2)
    assert [record.kind for record in told] == ["pace", "change"] and run.plan is plan
    assert told[1].change.startswith(f"the plan stays: {why}")


SLEEPY = '''WIDTH = 8
import time

import torch.distributed as dist

class Sleepy(nn.Module):
    """Sleeps in forward: on rank 1 longer during some batches if SLOW."""

    def forward(self, x):
        late = SLOW and dist.get_rank() == 1 and 4 <= float(x[0, 0]) < 9
        time.sleep(0.02 if late else 0.002)
        return x
'''


def sleepy(directory: Path, *, slow: bool) -> Path:
    return write_recipe(
        directory,
        ("WIDTH = 8\n", SLEEPY.replace("SLOW", str(slow))),
        ("nn.Sequential(*layers,", "nn.Sequential(*[Sleepy() for _ in range(4)], *layers,"),
        ("return 6", "return 40"),
        ("for _ in range(6):", "for index in range(40):"),
        ("yield inputs,", "inputs[:, 0] = index\n            yield inputs,"),
        name=f"sleepy_{slow}.py",
    )


def train(recipe: Path, out: Path) -> None:
    options = TrainOptions(
        plan=PlanRequest(num_stages=2, num_microbatches=4), run=out, num_steps=14, record=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOOK_EVERY", 1)
        console = Console(file=io.StringIO(), width=300)
        run_training(load_recipe(recipe), options, console=console, stop=StopRequest())


def test_losses_are_those_of_the_run_without_a_slow_rank(tmp_path: Path, pools: Pools) -> None:
    """Dropout, the optimizer's state and the data's position move along with the cells."""
    pools[2].run(train, sleepy(tmp_path, slow=True), tmp_path / "slow", seconds=120)
    log = log_of(tmp_path / "slow")
    assert any("cells per stage" in record.get("change", "") for record in log), log
    train(sleepy(tmp_path, slow=False), tmp_path / "wanted")
    losses = [
        [record["loss"] for record in log_of(tmp_path / name) if "loss" in record]
        for name in ("slow", "wanted")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 14
