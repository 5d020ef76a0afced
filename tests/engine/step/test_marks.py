"""On an accelerator, times are those of its kernels. The meta device stands for one."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import stagewise
from stagewise.engine.step import programs, step
from stagewise.model.chain import chain_of
from stagewise.profiling.trial_steps import profile

META = torch.device("meta")


class Device:
    """Its kernels end at `end`, on its own clock, however long ago they were launched."""

    def __init__(self) -> None:
        self.end, self.waits = 0.0, 0

    def record_event(self, event: "Event") -> None:
        event.at = self.end


class Event:
    device: Device

    def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
        assert device == META and enable_timing

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1000

    def synchronize(self) -> None:
        self.device.waits += 1

    at: float


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Event.device = Device()
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: made)
    monkeypatch.setattr(programs, "has_streams", lambda device: device == META)
    current = SimpleNamespace(device=lambda device: nullcontext())
    monkeypatch.setattr(torch, "get_device_module", lambda device: current)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
    monkeypatch.setattr(step, "_FIRST", 0)
    return made


class Timed(torch.autograd.Function):
    """Kernels of known length, forward and backward."""

    @staticmethod
    def forward(ctx, x, device, seconds):  # type: ignore[no-untyped-def]
        ctx.more = device, seconds
        device.end += seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        device, seconds = ctx.more
        device.end += 2 * seconds
        return gradient.clone(), None, None


class Takes(nn.Linear):
    def __init__(self, device: Device, seconds: float) -> None:
        super().__init__(4, 4)
        self.clock, self.seconds = device, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Timed.apply(super().forward(x), self.clock, self.seconds)  # type: ignore[no-any-return,no-untyped-call]


def test_a_timeline_holds_the_times_of_kernels_and_waits_when_it_is_read(device: Device) -> None:
    model = nn.Sequential(Takes(device, 3.0), Takes(device, 5.0))
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, devices=[META, META])
    pipe._runner._num_calls = dict.fromkeys(pipe._runner._num_calls, 1)
    began = time.perf_counter()
    pipe.step(torch.ones(4, 4), target=torch.ones(4, 4))
    assert device.waits == 0
    timeline = pipe.timeline()
    assert timeline == pipe.timeline()
    assert device.waits == 2  # for the last kernel, and for the time
    seconds = {str(span.instruction): round(span.seconds, 6) for span in timeline.spans}
    assert seconds == {
        **{"0F0": 3, "0F1": 3, "1F0": 5, "1F1": 5},
        **{"0B0": 6, "0B1": 6, "1B0": 10, "1B1": 10},
    }
    # The last kernel ended when the host had waited for it, on the host's clock.
    last = max(span.end_seconds for span in timeline.spans)
    assert 0 < last < time.perf_counter() - began


def test_measured_costs_are_those_of_kernels(device: Device) -> None:
    chain = chain_of(nn.Sequential(Takes(device, 3.0), Takes(device, 5.0)).to(META))
    batch = torch.ones(4, 4), torch.ones(4, 4), {}
    costs = profile(chain, batch, loss=nn.functional.mse_loss, device=META, seconds=0.0)
    assert [round(cost.forward_seconds, 6) for cost in costs] == [3, 5]
    assert [round(cost.backward_seconds, 6) for cost in costs] == [6, 10]
