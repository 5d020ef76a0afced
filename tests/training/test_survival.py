"""Killed ranks whose stages have replicas: the run goes on, and nothing differs."""

import io
import json
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from rich.console import Console
from torch.distributed import TCPStore
from torch.distributed.checkpoint import FileSystemReader

from stagewise.checkpoints.exporting import export_model
from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.errors import CheckpointError, PeerError, StagewiseError
from stagewise.planning import Plan
from stagewise.training.prepare import Trained, TrainOptions
from stagewise.training.recipe import Recipe, load_recipe
from stagewise.training.run_folder import find
from stagewise.training.survival import Survival, WentOn
from stagewise.training.trainer import run_training
from stagewise.training.update import Stepper
from stagewise.training.workers.kept_states import KEPT_STATES, memory_for
from stagewise.training.workers.lost import REPLACES, LostWorkers
from stagewise.training.workers.stop import StopRequest
from stagewise.training.workers.survivors import Survivors
from tests.harness import CONTEXT
from tests.recipes import log_of

RECIPE = """
import json, os, signal
import torch
from torch import nn

accumulate, clip_grad_norm = 2, 0.1
KILLS = json.loads(os.environ.get("KILLS", "{}"))
DRAWN = 0

def strike(place):
    is_first = "STAGEWISE_REPLACES" not in os.environ
    if is_first and KILLS.get(os.environ.get("RANK")) == [place, (DRAWN + 1) // 2]:
        os.kill(os.getpid(), signal.SIGKILL)

class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        strike("forward")
        return x + self.dropout(torch.tanh(self.norm(self.linear(x))))

def model():
    return nn.Sequential(*(Cell() for _ in range(4))).double()

def data(split):
    if split != "train":
        return [(torch.ones(8, 6).double(), torch.zeros(8, 6).double())]
    return Batches()

class Batches:
    def __len__(self):
        return 40

    def __iter__(self):
        global DRAWN
        DRAWN = 0
        for _ in range(40):
            DRAWN += 1
            x = torch.randn(32, 6).double()
            yield x, x.roll(1, 1)

loss = nn.functional.mse_loss

class Optimizer(torch.optim.AdamW):
    def step(self, closure=None):
        strike("optimizer")
        return super().step(closure)

def optimizer(parameters):
    return Optimizer(parameters, lr=1e-2)

def scheduler(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

def state(module):
    return {"ema": torch.optim.swa_utils.AveragedModel(module, use_buffers=True)}
"""
PLAN = Plan(balance=(2, 2), replicas=(2, 2), schedule="1f1b", num_microbatches=4)


def launched(
    folder: Path, out: str, kills: dict[str, list[object]], size: int = 4, replaced: int = 0
) -> list[int | None]:
    """Train as our launcher does, which tells the others who was killed; return exit codes."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    stop = folder / f"{out}-launcher" / "stop"
    stop.parent.mkdir()
    environment = {
        "KILLS": json.dumps(kills),
        "STAGEWISE_STOP_FILE": str(stop),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "survival",
    }
    processes, running = list[BaseProcess](), dict[int, int]()
    memory = ExitStack()
    environment[KEPT_STATES] = memory.enter_context(memory_for(size, stop.parent))

    def start(rank: int) -> None:
        arguments = folder, out, rank, environment, replaced
        processes.append(process := CONTEXT.Process(target=worker, args=arguments))
        process.start()
        running[process.sentinel] = rank

    for rank in range(size):
        start(rank)
    lost, deadline = LostWorkers.of({}, str(stop)), time.monotonic() + 90
    try:
        while running:
            ended = wait(running, deadline - time.monotonic())
            assert ended, f"ranks {[*running.values()]} hang"
            for sentinel in ended:
                rank = running.pop(sentinel)  # type: ignore[call-overload]
                [code] = [each.exitcode for each in processes if each.sentinel == sentinel]
                if code == -signal.SIGKILL and lost.are_expected:
                    lost.add(rank, MemoryKills().in_words())
                    if replaced:
                        environment[REPLACES] = "1"
                        start(rank)
    finally:
        memory.close()
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def worker(folder: Path, out: str, rank: int, environment: dict[str, str], replaced: int) -> None:
    output = os.open(folder / f"{out}-output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "STAGEWISE_LAUNCHER": str(os.getppid())}
    os.environ.update(environment, **here)
    os.chdir(folder)
    words = "train recipe.py --plan plan.json --steps 7 --validate-every 3 --checkpoint-every 3"
    from stagewise.cli.main import app

    app([*words.split(), "--timeout", "60", "--out", out, "--replace-lost", str(replaced)])


def test_losses_and_parameters_are_those_of_the_run_without_losses(tmp_path: Path) -> None:
    """One rank is killed in a forward of step 3, another when step 5 is being applied."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    options = TrainOptions(
        plan=PLAN, run=tmp_path / "whole", num_steps=7, validate_every=3, checkpoint_every=3
    )
    recipe, console = load_recipe(tmp_path / "recipe.py"), Console(file=io.StringIO())
    run_training(recipe, options, console=console, stop=StopRequest())
    kills: dict[str, list[object]] = {"0": ["forward", 3], "3": ["optimizer", 5]}
    assert launched(tmp_path, "struck", kills) == [-signal.SIGKILL, 0, 0, -signal.SIGKILL]

    whole, struck = (log_of(tmp_path / name) for name in ("whole", "struck"))
    losses = [{e["step"]: e["loss"] for e in log if "loss" in e} for log in (whole, struck)]
    assert [*losses[1]] == [*range(1, 8)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    told = [(e["step"], e["loss_of_ranks"]) for e in struck if "loss_of_ranks" in e]
    assert told == [
        (2, "going on without rank 0: stage 0 runs on 1 rank instead of 2"),
        (5, "going on without rank 2: stage 1 runs on 1 rank instead of 2"),
    ]
    output = (tmp_path / "struck-output").read_text()
    assert "passed without progress; step 3 was begun again" in output
    assert "passed without progress; no step was repeated" in output

    states = [export_of(tmp_path / name) for name in ("whole", "struck")]
    torch.testing.assert_close(states[1], states[0], rtol=1e-12, atol=1e-12)


def test_workers_started_anew_go_on_with_what_the_lost_ones_had_kept(tmp_path: Path) -> None:
    """One of two workers is killed in a forward of step 3, the other when step 5 is applied."""
    plan = replace(PLAN, replicas=())
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert launched(tmp_path, "whole", {}, 2) == [0, 0]
    kills: dict[str, list[object]] = {"1": ["forward", 3], "0": ["optimizer", 5]}
    codes = launched(tmp_path, "struck", kills, 2, replaced=2)
    assert sorted(codes) == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]  # type: ignore[type-var]

    whole, struck = (log_of(tmp_path / name) for name in ("whole", "struck"))
    losses = [{e["step"]: e["loss"] for e in log if "loss" in e} for log in (whole, struck)]
    assert losses[1] == losses[0] and len(losses[0]) == 7
    told = [e["step"] for e in struck if "loss_of_ranks" in e]
    assert told[0] in (1, 2) and told[1] in (3, 4)
    states = [export_of(tmp_path / name) for name in ("whole", "struck")]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    entries = [find(tmp_path / name).path for name in ("whole", "struck")]
    assert contents(entries[1]) == contents(entries[0])  # of the optimizer, and all others


def contents(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of every entry of every rank's file."""
    index = FileSystemReader(checkpoint).read_metadata()
    assert index.storage_data is not None and len(index.storage_data) > 40
    return {
        key.fqn: (checkpoint / place.relative_path).read_bytes()[place.offset :][: place.length]
        for key, place in index.storage_data.items()
    }


@pytest.mark.parametrize("lost", [{}, {0: "SIGKILL", 1: "SIGKILL"}])  # nobody, or a whole stage
def test_what_is_no_loss_or_cannot_be_borne_is_raised_as_it_is(lost: dict[int, str]) -> None:
    survival, error = object.__new__(Survival), CheckpointError("the disk of rank 0 is full")
    survival._replaces, survival._going = False, None
    survival._survivors = cast("Survivors", SimpleNamespace(newly_lost=lambda error: lost))
    trained = cast("Trained", SimpleNamespace(pipe=SimpleNamespace(plan=PLAN)))
    with pytest.raises(CheckpointError) as raised:
        survival.go_on(error, trained, cast("Stepper", SimpleNamespace(ran=None)))
    assert raised.value is error


def test_one_that_is_lost_as_the_others_go_on_is_left_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is killed in a step, and rank 2 of those that are left while they build."""
    trained = cast("Trained", SimpleNamespace(pipe=SimpleNamespace(plan=PLAN)))
    losses, plans = [{0: "SIGKILL"}, {1: "SIGBUS"}], list[Plan]()

    def rebuild(recipe: object, options: object, plan: Plan, *_: object) -> Trained:
        plans.append(plan)
        if len(plans) == 1:
            raise PeerError("rank 0 lost rank 1 while building")
        return trained

    monkeypatch.setattr("stagewise.training.survival.rebuild", rebuild)
    survival = object.__new__(Survival)
    survival._replaces, survival._halted, survival._going = False, None, None
    survival._locks, survival._inputs = ExitStack(), None
    survival._recipe = cast("Recipe", SimpleNamespace(accumulate=1))
    survival._options = TrainOptions(plan=PLAN, run=tmp_path)
    meets = SimpleNamespace(newly_lost=lambda error: losses[0], meet=lambda error: losses.pop(0))
    survival._survivors = cast("Survivors", meets)
    stepper = SimpleNamespace(ran=None, applied=4, applied_at=0.0, begun=5, settle=lambda _: None)
    went = list[WentOn]()

    def work(lost: StagewiseError | None) -> None:
        if lost is None:
            raise PeerError("rank 1 lost rank 0")
        went.append(survival.go_on(lost, trained, cast("Stepper", stepper)))

    error = None
    while (error := survival.lost_during(work, error)) is not None:
        pass
    assert [plan.replicas for plan in plans] == [(1, 2), (1, 1)]
    assert went[0].first_was_lost
    assert went[0].record.change == (
        "going on without rank 0, then rank 1: stage 0 runs on 1 rank instead of 2, stage 1 runs "
        "on 1 rank instead of 2"
    )
    assert went[0].record.reason == "rank 0 was lost (SIGKILL); then rank 1 was lost (SIGBUS)"


def export_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    checkpoint = find(run)
    assert checkpoint.step == 7
    export_model(checkpoint.path, run / "weights.safetensors")
    return load_file(run / "weights.safetensors")
