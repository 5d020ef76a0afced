"""A device whose kernels end long after the host has issued them; a stand-in with a clock."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import stagewise
from stagewise.engine.step import marks, programs
from stagewise.pipeline.record import recorded_mail, step_recorder
from stagewise.recording import Phase, idle_time
from stagewise.schedule import Instruction

KERNELS = 5e-3  # seconds that what is issued between two marks takes


@dataclass
class Device:
    """Its queue, and the host's clock, which goes on by a microsecond whenever it is read."""

    host: float = 0.0
    queue: float = 0.0

    def now(self) -> float:
        self.host += 1e-6
        return self.host

    def mark(self, device: torch.device) -> "Event":
        self.queue = max(self.queue, self.host) + KERNELS
        return Event(self, self.queue)


@dataclass
class Event:
    """A mark in the queue."""

    device: Device
    at: float

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other.at - self.at)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    for module in (marks, step_recorder):
        monkeypatch.setattr(module, "mark", device.mark)
    for module in (programs, step_recorder):
        monkeypatch.setattr(module, "has_streams", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", device.now)
        patch.setattr(recorded_mail, "_now", device.now)
        yield device


def test_a_recording_has_the_devices_times(device: Device) -> None:
    model = [nn.Linear(4, 4), nn.Linear(4, 1)]
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=3)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
    x, y = torch.ones(6, 4), torch.ones(6, 1)
    with pipe.record() as recorder:
        for _ in range(2):
            pipe.step(x, target=y)
            optimizer.step()
        assert device.host < KERNELS  # the host has waited for nothing
    for step in recorder.recording.steps:
        when = {str(e.what): e for e in step.events if isinstance(e.what, Instruction)}
        assert len(when) == 12
        for event in (*when.values(), *(e for e in step.events if e.what is Phase.OPTIMIZER)):
            assert event.end_ns - event.start_ns == pytest.approx(1e9 * KERNELS, abs=2)
            assert event.cpu_ns is None and event.cpu_before_ns is None
        for each in step.messages:
            kind, m = each.message.kind, each.message.microbatch
            made = when[f"{each.message.source_stage}{kind}{m}"]
            taken = when[f"{each.message.destination_stage}{kind}{m}"]
            assert each.sent_ns == each.released_ns == made.end_ns
            assert each.arrived_ns == each.used_ns == taken.start_ns
        assert len(step.messages) == 6
        idle = idle_time(step, takes_turns=True)
        assert idle.busy_ns == (pytest.approx(6e9 * KERNELS, abs=12),) * 2
        assert [sum(causes.values()) for causes in idle.by_cause] == list(idle.idle_ns)
