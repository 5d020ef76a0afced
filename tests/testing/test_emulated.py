"""Emulated cells, on a device that writes down how long it was asked to be busy."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining._backward import (
    stage_backward,
    stage_backward_input,
    stage_backward_weight,
)

import stagewise
from stagewise.engine.stage.work import Mode
from stagewise.engine.step.step_request import Request
from stagewise.testing import EmulatedDevice, emulated_model

FORWARD, BACKWARD, WEIGHT = [1.0, 2.0], [30.0, 50.0], [10.0, 0.0]


class Diary(EmulatedDevice):
    """Sleeps never."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[float] = []

    def busy(self, start: float, seconds: float) -> None:
        self.entries.append(seconds)

    def take(self) -> list[float]:
        entries, self.entries = self.entries, []
        return entries


def test_hands_on_what_it_is_given() -> None:
    device, x = Diary(), torch.randn(2, 3, requires_grad=True)
    y = emulated_model(FORWARD, BACKWARD, device, WEIGHT)(x)
    assert torch.equal(y, x) and device.take() == FORWARD
    y.backward(torch.arange(6.0).view(2, 3))
    assert x.grad is not None and torch.equal(x.grad, torch.arange(6.0).view(2, 3))
    assert sorted(device.take()) == [10.0, 20.0, 50.0]


@pytest.mark.parametrize("balance", [(2,), (1, 1)])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_busy_by_instruction(balance: tuple[int, ...], needs_gradient: bool) -> None:
    """Two microbatches, one whole and one in halves."""
    num_stages = len(balance)
    programs = tuple(f"{s}F0 {s}F1 {s}B0 {s}I1 {s}W1" for s in range(num_stages))
    plan = stagewise.Plan(balance=balance, schedule="mixed", num_microbatches=2, programs=programs)
    device = Diary()
    model = emulated_model(FORWARD, BACKWARD, device, WEIGHT)
    pipe = stagewise.Pipeline(model, plan, loss=lambda output, target: output.sum())
    seen: dict[str, list[float]] = {}
    x = torch.ones(2, 3, requires_grad=needs_gradient)
    request = Request(
        mode=Mode.TRAIN,
        inputs=x,
        target=x.detach(),
        observe=lambda instruction: seen.update({str(instruction): device.take()}),
    )
    pipe._runner.run(request)
    kinds = {
        kind: sorted(itertools.chain(*(seen[f"{s}{kind}"] for s in range(num_stages))))
        for kind in ("F0", "F1", "B0", "I1", "W1")
    }
    assert kinds["F0"] == kinds["F1"] == FORWARD
    assert kinds["B0"] == [10.0, 20.0, 50.0]
    assert (kinds["I1"], kinds["W1"]) == ([20.0, 50.0], [10.0])


def test_under_torchs_zero_bubble() -> None:
    """The functions that torch.distributed.pipelining splits a backward with."""
    device = Diary()
    model = emulated_model(FORWARD, BACKWARD, device, WEIGHT)
    x = torch.randn(2, 3, requires_grad=True)

    def forward() -> Tensor:
        y: Tensor = model(x)
        device.take()
        return y

    stage_backward([forward()], [torch.ones(2, 3)], [x])
    assert sorted(device.take()) == [10.0, 20.0, 50.0]
    inputs, groups = stage_backward_input(
        [forward()], [torch.ones(2, 3)], [x], iter(model.parameters())
    )
    assert torch.equal(inputs[0], torch.ones(2, 3))
    assert sorted(device.take()) == [20.0, 50.0]
    stage_backward_weight(iter(model.parameters()), groups)
    assert device.take() == [10.0]


def test_a_step_at_another_speed_runs_cells_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look takes the device's clock for a state, or its speed for a flag, of the model."""
    device, num_sleeps = EmulatedDevice(), [0]
    busy = EmulatedDevice.busy

    def counted(self: EmulatedDevice, start: float, seconds: float) -> None:
        num_sleeps[0] += 1
        busy(self, start, seconds)

    monkeypatch.setattr(EmulatedDevice, "busy", counted)
    plan = stagewise.Plan(balance=(1, 1), num_microbatches=2, schedule="1f1b")
    model = emulated_model([1e-6] * 2, [2e-6] * 2, device)
    pipe = stagewise.Pipeline(model, plan, loss=lambda output, target: output.mean())
    batch = torch.zeros(2, 1024)
    device.speed = float("inf")
    for _ in range(9):
        pipe.step(batch, target=batch)
    device.speed, num_sleeps[0] = 1.0, 0
    for step in range(1, 4):
        pipe.step(batch, target=batch)
        assert num_sleeps[0] == step * 2 * 2 * 2  # microbatches, cells, forwards and backwards
