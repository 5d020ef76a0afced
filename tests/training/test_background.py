"""Checkpoints are written while training goes on: exact, one at a time, and told when they fail."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Event, get_native_id
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stagewise
from stagewise.errors import CheckpointError
from stagewise.planning import Plan
from stagewise.training import background
from stagewise.training import checkpoint as checkpoints
from stagewise.training.background import Saver
from stagewise.training.checkpoint import write
from stagewise.training.checkpoint_errors import explain_write_errors
from stagewise.training.outcome import RunOutcome
from stagewise.training.prepare import Trained, TrainOptions
from stagewise.training.recipe import load_recipe
from stagewise.training.run_folder import DIRECTORY, best, find, find_undamaged
from stagewise.training.state.run_state import NOTHING, Extra
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest
from tests.harness import Pools
from tests.recipes import log_of, write_recipe


def build() -> Trained:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    optimizer = torch.optim.SGD([{"params": [*pipe.parameters()]}], lr=0.1, momentum=0.9)
    return Trained(pipe=pipe, optimizer=optimizer, scheduler=None, objects={})


def train(trained: Trained) -> None:
    trained.pipe.zero_grad()
    trained.pipe.step(torch.ones(4, 4), target=torch.zeros(4, 4))
    assert trained.optimizer is not None
    trained.optimizer.step()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / DIRECTORY).iterdir())


class Held:
    """A `write` that waits until it is released, and may then fail."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.released, self.started, self.error = Event(), Event(), error
        self.priority: int | None = None

    def __call__(self, *arguments: Any) -> Any:
        self.priority = os.getpriority(os.PRIO_PROCESS, get_native_id())
        self.started.set()
        assert self.released.wait(30)
        if self.error is not None:
            raise self.error
        return write(*arguments)


def test_what_is_written_is_the_state_of_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held()
    monkeypatch.setattr(background, "write", held)
    saver, trained = Saver(tmp_path, None, 2), build()
    train(trained)
    assert trained.optimizer is not None
    at_step = {n: value.clone() for n, value in trained.pipe.state_dict().items()}
    momenta = [s["momentum_buffer"].clone() for s in trained.optimizer.state.values()]
    saver.save(trained, step=1, seed=0, extra=NOTHING)
    assert held.started.wait(30) and saver.last is None and not saver.failed
    if sys.platform == "linux":  # training's own priority has not changed
        assert held.priority == min(os.getpriority(os.PRIO_PROCESS, get_native_id()) + 10, 19)
    train(trained)  # meanwhile
    held.released.set()
    saver.finish()
    assert saver.last is not None and saver.last.step == 1

    other = build()
    checkpoints.restore(find(tmp_path), other.pipe, other.optimizer)
    assert other.optimizer is not None
    state = other.pipe.state_dict()
    assert all(torch.equal(at_step[name], state[name]) for name in at_step)
    restored = [s["momentum_buffer"] for s in other.optimizer.state.values()]
    assert all(map(torch.equal, momenta, restored))


@pytest.mark.parametrize("told", ["by finish", "by the next save"])
def test_an_error_is_told_later_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    held = Held(OSError(5, "Input/output error"))
    held.released.set()
    monkeypatch.setattr(background, "write", held)
    saver, trained = Saver(tmp_path, None, 2), build()
    saver.save(trained, step=1, seed=0, extra=NOTHING)
    with pytest.raises(CheckpointError, match=r"Input/output error.*--resume"):
        if told == "by finish":
            saver.finish()
        else:
            saver.save(trained, step=2, seed=0, extra=NOTHING)
    assert not saver.failed
    saver.finish()
    assert saver.last is None


def run(recipe: Path, out: Path, **more: Any) -> RunOutcome:
    plan = Plan(balance=(5, 5), schedule="1f1b", num_microbatches=2)
    options = TrainOptions(plan=plan, run=out, num_steps=6, **more)
    console = Console(file=io.StringIO())
    return run_training(load_recipe(recipe), options, console=console, stop=StopRequest())


def test_a_full_disk_ends_the_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: Callable[..., None] = checkpoints.save_distributed

    def full(state: object, *, checkpoint_id: Path, **more: Any) -> None:
        if "step-00000004" in str(checkpoint_id):
            raise RuntimeError("unexpected pos 704 vs 598") from OSError(28, "No space left")
        saved(state, checkpoint_id=checkpoint_id, **more)

    monkeypatch.setattr(checkpoints, "save_distributed", full)
    with pytest.raises(CheckpointError, match=r"step-00000004 .* No space left \(ENOSPC\)"):
        run(write_recipe(tmp_path), tmp_path / "run", checkpoint_every=2)
    assert names(tmp_path / "run") == ["step-00000002"]
    run(write_recipe(tmp_path), tmp_path / "again", resume=find(tmp_path / "run"))
    assert [r["step"] for r in log_of(tmp_path / "again") if "loss" in r] == [3, 4, 5, 6]


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    trained = build()
    for step, loss in enumerate([3.0, 1.0, 1.0, 2.0, None, float("nan"), 4.0], start=1):
        extra = Extra(validation_loss=loss)
        checkpoints.save(tmp_path, trained.pipe, trained.optimizer, step=step, seed=0, extra=extra)
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]
    found = best(tmp_path)
    assert found is not None and (found.step, found.validation_loss) == (3, 1.0)


def test_a_run_keeps_as_many_as_it_is_told_and_says_which_is_best(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    outcome = run(recipe, out, checkpoint_every=1, validate_every=2, keep=1)
    losses = {r["step"]: r["validation_loss"] for r in log_of(out) if "validation_loss" in r}
    lowest = min(losses[step] for step in (2, 4, 6))
    assert outcome.best is not None and outcome.best.validation_loss == lowest
    assert names(out) == sorted({outcome.best.path.name, "step-00000006"})


def test_what_a_killed_run_left_half_written_is_removed_and_told(tmp_path: Path) -> None:
    trained = build()
    checkpoints.save(tmp_path, trained.pipe, trained.optimizer, step=1, seed=0)
    (tmp_path / DIRECTORY / "step-00000002.tmp").mkdir()
    checkpoint, told = find_undamaged(tmp_path)
    assert checkpoint.step == 1 and "step-00000002 was not written to its end" in told[0]
    checkpoints.save(tmp_path, trained.pipe, trained.optimizer, step=3, seed=0)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_the_same_step_is_replaced_whole(tmp_path: Path) -> None:
    trained = build()
    for _ in range(2):
        train(trained)
        checkpoints.save(tmp_path, trained.pipe, trained.optimizer, step=1, seed=0)
    assert names(tmp_path) == ["step-00000001"]
    other = build()
    checkpoints.restore(find(tmp_path), other.pipe, other.optimizer)
    state = other.pipe.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in trained.pipe.state_dict().items())


def saving_on_ranks(run: Path) -> str:
    """Three checkpoints; the disk of rank 1 is full at another, which every rank is told."""
    trained, saver = build(), Saver(run, None, 2)
    for step in (1, 2, 3):
        train(trained)
        saver.save(trained, step=step, seed=0, extra=NOTHING)
    train(trained)
    saver.finish()
    full = Held(OSError(28, "No space left on device"))
    full.released.set()
    with ExitStack() as stack:
        if trained.pipe.rank == 1:
            stack.enter_context(patch.object(checkpoints, "sha256_of", full))
        saver.save(trained, step=4, seed=0, extra=NOTHING)
        with pytest.raises(CheckpointError) as caught:
            saver.finish()
    return str(caught.value)


def test_a_rank_that_cannot_write_leaves_the_others_what_they_read(tmp_path: Path) -> None:
    """It was removed at once, and sometimes another rank then failed first, for want of a file."""
    unfinished = tmp_path / DIRECTORY / "step-00000001.tmp"
    unfinished.mkdir(parents=True)
    with pytest.raises(CheckpointError), explain_write_errors(unfinished, tmp_path):
        raise OSError(28, "No space left on device")
    assert unfinished.exists()


def test_ranks_write_together(tmp_path: Path, pools: Pools) -> None:
    told = pools[2].run(saving_on_ranks, tmp_path)
    assert all("No space left on device (ENOSPC)" in text for text in told)
    assert told[0].startswith("rank 1: ") and "step-00000003 is untouched" in told[0]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    trained = build()
    checkpoint, warnings = find_undamaged(tmp_path)
    assert not warnings and checkpoint.step == 3
    checkpoints.restore(checkpoint, trained.pipe, trained.optimizer)


def on_mesh() -> Trained:
    """Two stages, each sharded over two ranks; alone, both stages in one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    more: dict[str, Any] = {}
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))
        data = mesh["dp_shard"]
        more = {"mesh": mesh, "parallelize": lambda stage, *_: fully_shard(stage, mesh=data)}
    plan = Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, **more)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.1)
    return Trained(pipe=pipe, optimizer=optimizer, scheduler=None, objects={})


def trained_on_mesh(trained: Trained) -> float:
    parts = 2 if dist.is_initialized() else 1
    inputs = torch.linspace(-1, 1, 32).view(8, 4)
    inputs = inputs.tensor_split(parts)[dist.get_rank() % 2 if parts == 2 else 0]
    trained.pipe.zero_grad()
    loss = trained.pipe.step(inputs, target=torch.zeros_like(inputs))
    assert trained.optimizer is not None
    trained.optimizer.step()
    return float(loss)


def saved_on_mesh(run: Path) -> list[float]:
    """The losses after a checkpoint, of the run that went on and of the one that resumed."""
    trained, saver = on_mesh(), Saver(run, None, 2)
    trained_on_mesh(trained)
    saver.save(trained, step=1, seed=0, extra=NOTHING)
    losses = [trained_on_mesh(trained) for _ in range(2)]
    saver.finish()
    again = on_mesh()
    checkpoints.restore(find(run), again.pipe, again.optimizer)
    return losses + [trained_on_mesh(again) for _ in range(2)]


def test_a_sharded_optimizer_is_resumed_on_the_mesh_and_without_it(
    tmp_path: Path, pools: Pools
) -> None:
    for losses in pools[4].run(saved_on_mesh, tmp_path):
        assert losses[:2] == losses[2:]
    alone = on_mesh()
    checkpoints.restore(find(tmp_path), alone.pipe, alone.optimizer)
    assert [trained_on_mesh(alone) for _ in range(2)] == pytest.approx(losses[:2], rel=2e-7)
