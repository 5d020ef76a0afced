"""What makes the host wait for a device in a step: a budget. The meta device stands for one."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stagewise
from stagewise.engine.stage.work import Mode, Work
from stagewise.engine.step import step
from stagewise.engine.step.results import agree_on_losses
from stagewise.mesh import Slices
from stagewise.model.added_losses import MAIN_LOSS

WAIT = "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"


class Masked(nn.Linear):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * mask


class Shifted(nn.Linear):
    def forward(self, x: torch.Tensor, mask: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * mask + shift


class Counting(TorchDispatchMode):
    """Counts copies between devices by whether they wait, and reads of a value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[bool] = Counter()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func) == "aten._to_copy.default" and kwargs.get("device") != args[0].device:
            self.copies[bool(kwargs.get("non_blocking"))] += 1
        if str(func) in WAIT:
            self.reads.append(str(func))
        return func(*args, **kwargs)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device without values, where nothing can wait."""
    current = SimpleNamespace(device=lambda device: nullcontext())
    monkeypatch.setattr(torch, "get_device_module", lambda device: current)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
    monkeypatch.setattr(step, "_FIRST", 0)  # a call that is examined waits
    return torch.device("meta")


def test_every_part_of_the_batch_is_copied_once_and_nothing_waits(stand_in: torch.device) -> None:
    model = nn.Sequential(Masked(4, 4), Shifted(4, 4), Shifted(4, 4))
    plan = stagewise.Plan(balance=(1, 1, 1), schedule="1f1b", num_microbatches=4)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, devices=[stand_in] * 3)
    pipe._runner._num_calls = dict.fromkeys(pipe._runner._num_calls, 1)
    batch = torch.ones(8, 4)
    with Counting() as counting:
        pipe.step(batch, target=torch.ones(8, 4), mask=torch.ones(8, 4), shift=torch.ones(8, 4))
    assert counting.copies == {True: 4 * 4}  # of inputs, target, mask and shift, per microbatch
    assert counting.reads == []


def test_kept_float32_sums_are_compared_with_grad_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_FIRST", 0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).bfloat16()
    plan = stagewise.Plan(balance=(1, 2), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, accumulate_in_float32=True)
    batch = torch.ones(4, 4, dtype=torch.bfloat16)
    pipe.step(batch, target=batch)
    with Counting() as counting:
        pipe.step(batch, target=batch)
    assert "aten.equal.default" not in counting.reads  # it was read for every parameter


def test_a_part_that_every_microbatch_needs_whole_is_copied_once(stand_in: torch.device) -> None:
    model = nn.Sequential(Masked(4, 4), Masked(4, 4))
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=4)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, devices=[stand_in] * 2)
    pipe._runner._num_calls = dict.fromkeys(pipe._runner._num_calls, 1)
    mask = stagewise.Replicated(torch.ones(4))
    with Counting() as counting:
        pipe.step(torch.ones(8, 4, device="meta"), target=torch.ones(8, 4), mask=mask)
    assert counting.copies == {True: 4 + 1}


def test_a_step_between_ranks_waits_once_for_its_loss() -> None:
    """On the rank that has it; others make it from numbers."""
    work = Work(mode=Mode.TRAIN, sizes=(2, 2), by_samples=(0.5, 0.5))
    exchanged: list[list[int]] = []

    def exchange(row: list[int], what: str) -> list[list[int]]:
        exchanged.append(row)
        return [[0, 0, 1, 0], exchanged[0]]

    for rank, num_reads in ((1, 1), (0, 0)):
        ranks: Any = SimpleNamespace(
            rank=rank, is_alone=False, slices=Slices.one(rank, 2), exchange_all=exchange
        )
        losses = {m: {MAIN_LOSS: torch.tensor(1.0 + m)} for m in range(2 * rank)}
        work.record.losses.clear()
        work.record.losses.update(losses)
        with Counting() as counting:
            agreed = agree_on_losses(ranks, work, 1, torch.device("cpu"))
        assert agreed is not None and agreed[0] is not None and float(agreed[0]) == 1.5
        assert len(counting.reads) == num_reads
