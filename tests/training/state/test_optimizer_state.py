"""An optimizer's state by name: as it is, without a step, at any cut."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import stagewise
from stagewise.checkpoints.untrusted import Reader
from stagewise.errors import CheckpointError
from stagewise.training import checkpoint as checkpoints
from stagewise.training import run_folder
from stagewise.training.state import schedules
from stagewise.training.state.run_state import Extra

Make = Callable[[list[nn.Parameter]], Optimizer]


class Half(nn.Module):
    """One part never gets a gradient, one from the third step on only."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.dead, self.late = (nn.Linear(4, 4) for _ in range(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.live(x)) if float(x[0, 0]) > 2 else self.live(x)


def groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    """By dimension, as for weight decay; a rank may have none of a kind."""
    matrices = [p for p in parameters if p.dim() > 2]
    others = [p for p in parameters if p.dim() <= 2]
    return [{"params": matrices, "lr": 0.3}, {"params": others, "weight_decay": 0.5}]


MAKERS: dict[str, Make] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.1),
    "groups": lambda ps: torch.optim.AdamW(groups(ps), lr=0.1),
    "tensor rate": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.1), foreach=False),
}


def build(make: Make, balance: tuple[int, ...]) -> tuple[stagewise.Pipeline, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(Half(), nn.Tanh(), nn.Linear(4, 4))
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    return pipe, make(list(pipe.parameters()))


def train(pipe: stagewise.Pipeline, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).clamp(-1, 1)
        optimizer.zero_grad()
        pipe.step(x + (4 if step >= 3 else 0), target=torch.zeros(8, 4))
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("paused_at", [0, 2, 4])
def test_a_pause_changes_nothing_whatever_has_no_gradient_yet(
    tmp_path: Path, name: str, paused_at: int
) -> None:
    pipe, optimizer = build(MAKERS[name], (3,))
    train(pipe, optimizer, range(paused_at))
    fired: list[object] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    gradients = [p.grad for p in pipe.parameters()]
    before = {k: len(v) for k, v in optimizer.state.items()}
    checkpoints.save(tmp_path, pipe, optimizer, step=paused_at, seed=0)
    assert not fired, "saving is no step"
    assert all(p.grad is g for p, g in zip(pipe.parameters(), gradients, strict=True))
    assert {k: len(v) for k, v in optimizer.state.items()} == before

    for balance in ((3,), (1, 2), (1, 1, 1)):
        other, again = build(MAKERS[name], balance)
        again.register_step_pre_hook(lambda *_: fired.append(1))
        checkpoints.restore(run_folder.find(tmp_path), other, again)
        assert not fired, "restoring is no step"
        train(other, again, range(paused_at, 6))
        whole, whole_optimizer = build(MAKERS[name], (3,))
        train(whole, whole_optimizer, range(6))
        expected, state = whole.state_dict(), other.state_dict()
        assert all(torch.equal(expected[name], state[name]) for name in expected)
        fired.clear()


def test_a_schedule_is_resumed_and_one_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    def ramp(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        lr = torch.optim.lr_scheduler
        parts = [lr.LinearLR(optimizer, 0.1, 1.0, 3), lr.MultiStepLR(optimizer, [1, 2])]
        return lr.SequentialLR(optimizer, parts, [3])  # type: ignore[arg-type]

    def run(pipe: stagewise.Pipeline, optimizer: Optimizer, scheduler: object, n: range) -> None:
        for step in n:
            train(pipe, optimizer, range(step, step + 1))
            scheduler.step()  # type: ignore[attr-defined]

    pipe, optimizer = build(MAKERS["groups"], (3,))
    scheduler = ramp(optimizer)
    run(pipe, optimizer, scheduler, range(3))
    with pytest.raises(CheckpointError, match="has a learning-rate schedule"):
        checkpoints.save(tmp_path, pipe, optimizer, step=3, seed=0)
    checkpoints.save(tmp_path, pipe, optimizer, step=3, seed=0, extra=Extra(scheduler=scheduler))
    run(pipe, optimizer, scheduler, range(3, 6))

    other, again = build(MAKERS["groups"], (1, 2))
    resumed = ramp(again)
    with pytest.raises(CheckpointError, match="to save and restore"):
        checkpoints.restore(run_folder.find(tmp_path), other, again)
    checkpoints.restore(run_folder.find(tmp_path), other, again, Extra(scheduler=resumed))
    run(other, again, resumed, range(3, 6))
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert resumed.last_epoch == scheduler.last_epoch == 6
    expected, state = pipe.state_dict(), other.state_dict()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    plain, plain_optimizer = build(MAKERS["groups"], (3,))
    checkpoints.save(tmp_path / "plain", plain, plain_optimizer, step=1, seed=0)
    with pytest.raises(CheckpointError, match="written without a learning-rate schedule"):
        checkpoints.restore(
            run_folder.find(tmp_path / "plain"), other, again, Extra(scheduler=resumed)
        )


def test_another_ranks_rates_are_not_taken() -> None:
    """Ranks have one group each, of other rates; one state is kept for all."""

    def ramp(rate: float) -> tuple[Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=rate)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    (first, one), (second, two) = ramp(0.1), ramp(0.2)
    for optimizer, scheduler in ((first, one), (second, two)):
        optimizer.step()
        scheduler.step()
    again, resumed = ramp(0.2)
    for group, kept in zip(again.param_groups, second.param_groups, strict=True):
        group.update(lr=kept["lr"], initial_lr=kept["initial_lr"])
    schedules.put_back(resumed, schedules.saved_state(one))
    assert resumed.get_last_lr() == two.get_last_lr() == [0.1]
    for optimizer, scheduler in ((second, two), (again, resumed)):
        optimizer.step()
        scheduler.step()
    assert again.param_groups[0]["lr"] == second.param_groups[0]["lr"] == 0.05


def test_options_of_all_parameters_are_one_entry_of_a_checkpoint(tmp_path: Path) -> None:
    """Each entry costs a checkpoint as much as a tensor; AdamW has a dozen options."""
    pipe, optimizer = build(MAKERS["groups"], (1, 2))
    train(pipe, optimizer, range(1))
    saved = checkpoints.save(tmp_path, pipe, optimizer, step=1, seed=0)
    entries = Reader(saved.path).read_metadata().state_dict_metadata
    others = {name for name in entries if not name.startswith(("model.", "optimizer.state."))}
    assert others == {"optimizer.groups.rank0", "random.rank0"}


def test_parameters_of_one_group_must_have_been_of_one(tmp_path: Path) -> None:
    pipe, optimizer = build(
        lambda ps: torch.optim.SGD([{"params": [p], "lr": 0.1 * n} for n, p in enumerate(ps)]), (3,)
    )
    checkpoints.save(tmp_path, pipe, optimizer, step=1, seed=0)
    other, one_group = build(MAKERS["sgd"], (3,))
    with pytest.raises(CheckpointError, match=r"several values of \['lr'\].*group 0"):
        checkpoints.restore(run_folder.find(tmp_path), other, one_group)
