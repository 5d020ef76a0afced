"""Copies between devices, against a model of their streams: what waits for what, and for how long.

The accelerators "xpu:0", "xpu:1" and so on are imagined. A tensor knows its device, and a copy
takes virtual time on both current streams, as torch's does.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stagewise.batch import lanes
from stagewise.batch.split import split_on
from stagewise.batch.values import ONE
from stagewise.engine.step.programs import _in_time_order
from stagewise.engine.transport.local import LocalMailbox
from stagewise.schedule import (
    SCHEDULES,
    Kind,
    Message,
    Schedule,
    forward_only,
    lower,
    named_schedule,
)

COPY_SECONDS = 0.02
SECONDS = {
    Kind.FORWARD: 1.0,
    Kind.RECOMPUTE: 1.0,
    Kind.BACKWARD: 2.0,
    Kind.BACKWARD_INPUT: 1.0,
    Kind.BACKWARD_WEIGHT: 1.0,
}


class Stream:
    """What it has been given so far ends at `end`; entering it makes it the current one."""

    machine: "Machine"

    def __init__(self, device: torch.device, name: str = "copies") -> None:
        self.device, self.name, self.end = device, f"{name} of {device.index}", 0.0

    def run(self, seconds: float) -> None:
        self.end += seconds

    def record_event(self) -> float:
        return self.end

    def wait_event(self, event: float) -> None:
        self.machine.log.append(f"{self.name} wait")
        self.end = max(self.end, event)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.end)

    def __enter__(self) -> None:
        self.before = self.machine.current(self.device)
        self.machine.streams[self.device] = self

    def __exit__(self, *_: object) -> None:
        self.machine.streams[self.device] = self.before


class There:
    """A tensor on one of the devices."""

    is_leaf, layout = True, torch.strided

    def __init__(self, machine: "Machine", device: torch.device) -> None:
        self.machine, self.device = machine, device

    def to(self, device: torch.device, non_blocking: bool = False) -> "There":
        source, destination = self.machine.current(self.device), self.machine.current(device)
        source.end = destination.end = max(source.end, destination.end) + COPY_SECONDS
        self.machine.log.append(f"copy on {source.name} and {destination.name}")
        return There(self.machine, device)

    def record_stream(self, stream: Stream) -> None:
        self.machine.log.append(f"memory of {self.device.index} in {stream.name}")


class Machine:
    """The current streams, and what has been asked of them."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, Stream] = {}
        self.log: list[str] = []

    def current(self, device: torch.device) -> Stream:
        return self.streams.setdefault(device, Stream(device, "kernels"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Stream.machine = Machine()
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", made.current)
    lanes.lane.cache_clear()
    yield made
    lanes.lane.cache_clear()


def devices(number: int) -> list[torch.device]:
    return [torch.device("xpu", index) for index in range(number)]


def test_a_copy_sets_out_when_it_is_sent_and_only_its_receiver_waits(machine: Machine) -> None:
    one, other = devices(2)
    mail = LocalMailbox([one, other])
    (message,) = lower(forward_only([(0,), (1,)], 1))[0][0].sends
    machine.current(one).run(1.0)
    mail.send(message, ([There(machine, one)], ONE))  # type: ignore[list-item]
    assert machine.log == [
        "copies of 0 wait",  # for the kernels that make the value
        "copy on copies of 0 and copies of 1",
        "memory of 0 in copies of 0",
    ]
    machine.log.clear()
    machine.current(one).run(5.0)  # later kernels of the source
    received: Any = mail.receive(message)
    assert received[0][0].device == other
    assert machine.log == ["kernels of 1 wait", "memory of 1 in kernels of 1"]
    assert machine.current(other).end == 1.0 + COPY_SECONDS
    assert machine.current(one).end == 6.0


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_step_takes_hardly_longer_than_the_copies_make_it(machine: Machine, name: str) -> None:
    """One process issues for all devices, in the executor's order.

    Copies issued at receive on the kernels' own streams take up to twice the possible time.
    """
    for num_devices in range(2, 9):
        machine.streams.clear()
        lanes.lane.cache_clear()
        machine.log.clear()
        schedule = named_schedule(name, num_devices, 2 * num_devices)
        taken, possible = issued(machine, schedule)
        assert taken <= 1.05 * possible, num_devices
        copies = sum(line.startswith("copy") for line in machine.log)
        sent = [m for program in lower(schedule) for step in program for m in step.sends]
        assert copies == sum(message.source != message.destination for message in sent)


def issued(machine: Machine, schedule: Schedule) -> tuple[float, float]:
    """When the last kernel of a step ends, and when it could if only its values were awaited."""
    there = devices(schedule.num_devices)
    mail = LocalMailbox([there[placed[0]] for placed in schedule.placement])
    steps = {step.instruction: step for program in lower(schedule) for step in program}
    possible = defaultdict[int, float](float)
    ready: dict[Message, float] = {}
    for at, instruction in _in_time_order(schedule):
        step, device = steps[instruction], there[at]
        for message in step.receives:
            mail.receive(message)
            possible[at] = max(possible[at], ready[message])
        seconds = SECONDS[instruction.kind]
        machine.current(device).run(seconds)
        possible[at] += seconds
        for message in step.sends:
            mail.send(message, ([There(machine, device)], ONE))  # type: ignore[list-item]
            ready[message] = possible[at] + COPY_SECONDS * (message.source != message.destination)
    return max(stream.end for stream in machine.streams.values()), max(possible.values())


def test_from_the_host_each_microbatch_is_copied_while_the_one_before_it_runs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (device,) = devices(1)
    begun: list[float] = []

    def copied(self: lanes.Lane, tensor: torch.Tensor) -> There:
        begun.append(float(tensor))
        machine.current(device).run(COPY_SECONDS)
        return There(machine, device)

    monkeypatch.setattr(lanes.Lane, "_copied", copied)
    arriving = split_on(device, torch.arange(3.0), [1, 1, 1])
    assert len(arriving) == 3 and not begun
    for m, so_far in enumerate(([0.0, 1.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0])):
        assert arriving[m] is arriving[m]
        assert begun == so_far
        assert machine.current(device).end == pytest.approx(COPY_SECONDS + m)
        machine.current(device).run(1.0)
    assert machine.log == ["kernels of 0 wait", "memory of 0 in kernels of 0"] * 3


def test_what_has_no_record_stream_is_copied_in_order(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, non_blocking: tensor)
    sparse = torch.eye(2).to_sparse()
    copies, event = lanes.lane(torch.device("cpu"), *devices(1)).start([sparse])
    assert copies[0] is sparse and event is None


def test_the_caller_may_change_a_batch_that_is_still_on_its_way(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    """Pinned memory is the caller's as well: a copy of it would be read while it changes."""
    monkeypatch.setattr(torch, "empty_like", lambda t, pin_memory: torch.zeros(t.shape))
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, non_blocking: sent.append(t) or t)
    batch = torch.ones(2)
    lane = lanes.lane(torch.device("cpu"), *devices(1))
    lane.start([batch])
    batch.zero_()
    assert sent[0].tolist() == [1.0, 1.0]
