"""A recording: steps with every instruction, every message, and what surrounds them, on one clock.

Times are whole nanoseconds of rank 0's clock, counted from the begin of the recording, so sums of
intervals are exact. The simulator's predictions have the same form.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from stagewise.schedule import Instruction, Message
from stagewise.timeline import Span, Timeline

SECOND = 1_000_000_000  # nanoseconds


class Phase(enum.StrEnum):
    """What a device's rank does outside of instructions."""

    DATA = "data"  # loads the batch
    AGREE = "agree"  # ranks agree on the call, and split the batch
    REDUCE = "reduce"  # ranks agree on the loss, and add gradients up
    OPTIMIZER = "optimizer"  # updates the parameters


@dataclass(frozen=True, kw_only=True)
class RecordedEvent:
    """An instruction, or a phase, as it ran on a device.

    `cpu_ns` is how long the thread that ran it had a core, `cpu_before_ns` how long since the event
    before; None if that is not known.
    """

    device: int
    what: Instruction | Phase
    start_ns: int
    end_ns: int
    cpu_ns: int | None = None
    cpu_before_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class RecordedMessage:
    """A message on its way from one device to another; None: not known.

    `posted_ns`: the receiver made room for it; `sent_ns`, `released_ns`: the sender began to send
    it, and could go on; `awaited_ns`: the receiver began to wait for it; `arrived_ns`: it was
    there (if nobody waited for it, not later than that); `used_ns`: its instruction began.
    """

    message: Message
    num_bytes: int
    sent_ns: int
    released_ns: int
    arrived_ns: int
    used_ns: int
    posted_ns: int | None = None
    awaited_ns: int | None = None


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """One step on all devices: from loading its data until the parameters are updated."""

    step: int
    num_devices: int
    plan: int  # index among the recording's plans
    events: tuple[RecordedEvent, ...]
    messages: tuple[RecordedMessage, ...] = ()

    @cached_property
    def start_ns(self) -> int:
        return min((event.start_ns for event in self.events), default=0)

    @cached_property
    def end_ns(self) -> int:
        return max((event.end_ns for event in self.events), default=0)

    @cached_property
    def timeline(self) -> Timeline:
        """The instructions alone, in seconds from the begin of the first one."""
        ran = [event for event in self.events if isinstance(event.what, Instruction)]
        origin = min((event.start_ns for event in ran), default=0)
        spans = (
            Span(
                device=event.device,
                instruction=event.what,
                start_seconds=(event.start_ns - origin) / SECOND,
                end_seconds=(event.end_ns - origin) / SECOND,
            )
            for event in ran
            if isinstance(event.what, Instruction)
        )
        in_order = sorted(spans, key=lambda span: (span.start_seconds, span.device))
        return Timeline(self.num_devices, tuple(in_order))


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A rank's clock: add `offset_ns` to get rank 0's time, which is right within `error_ns`."""

    rank: int
    host: str
    device: str
    offset_ns: int
    error_ns: int


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """The memory of a stage on a device: what it holds between steps, and what a step adds.

    `live` are (nanoseconds from the begin of a trial step, bytes that are kept for the backward).
    """

    stage: int
    device: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    live: tuple[tuple[int, int], ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most that is kept for the backward."""
        return max((num_bytes for _, num_bytes in self.live), default=0)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Recorded steps of a run, with its plans (as `Plan.to_json` writes them) and its machine."""

    num_devices: int
    clocks: tuple[Clock, ...] = ()
    plans: tuple[Mapping[str, object], ...] = ()
    steps: tuple[RecordedStep, ...] = ()
    memory: tuple[StageMemory, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def usual_step(self) -> RecordedStep | None:
        """The step of median length, which stands for all."""
        in_order: Sequence[RecordedStep] = sorted(
            self.steps, key=lambda step: (step.end_ns - step.start_ns, step.step)
        )
        return in_order[len(in_order) // 2] if in_order else None
