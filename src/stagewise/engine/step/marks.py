"""When an instruction ran on an accelerator, whose kernels end long after the host has issued them.

Idea: an event on the stage's stream before and after each instruction, as torch's profilers do. The
host waits for them once, and only if someone asks. Events give differences only, so one more event,
which the host does wait for, says where they lie on the host's clock.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from stagewise.engine.stage.work import Mark, Marks
from stagewise.schedule import Instruction

T = TypeVar("T")


@contextmanager
def marked(marks: Marks, instruction: Instruction, device: torch.device) -> Iterator[None]:
    """Enter the events around the body, which runs `instruction` on `device`."""
    start = mark(device)
    yield
    marks[instruction] = device, start, mark(device)


def host_seconds(marks: Mapping[T, Mark]) -> Mapping[T, tuple[float, float]]:
    """Return when what is marked began and ended by `time.perf_counter`; waits for them to end."""
    first: dict[torch.device, Any] = {}
    last: dict[torch.device, Any] = {}
    for device, start, end in marks.values():
        first.setdefault(device, start)
        last[device] = end
    for event in last.values():
        event.synchronize()  # the stream may no longer be the current one
    begun = {device: _host_time(event, device) for device, event in first.items()}

    def seconds(device: torch.device, event: Any) -> float:
        return begun[device] + float(first[device].elapsed_time(event)) / 1000

    return {
        instruction: (seconds(device, start), seconds(device, end))
        for instruction, (device, start, end) in marks.items()
    }


def mark(device: torch.device) -> Any:
    """Return an event on the current stream of `device`."""
    event = torch.Event(device, enable_timing=True)
    torch.accelerator.current_stream(device).record_event(event)
    return event


def _host_time(event: Any, device: torch.device) -> float:
    """Return when `event` was, by the host's clock."""
    now = mark(device)
    now.synchronize()
    return time.perf_counter() - float(event.elapsed_time(now)) / 1000
