"""A recorder is given to the executor of a rank, or to the simulator, and notes what it sees.

Only lists are appended to, in seconds of the process's own clock; everything else happens when the
step is over. A message is noted where it is sent and where it is received: `step_of` brings both
sides, and all ranks, together on one clock.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stagewise.recording.recorded import SECOND, Phase, RecordedEvent, RecordedMessage, RecordedStep
from stagewise.schedule import Instruction, Kind, Message
from stagewise.schedule.instruction import KINDS

_Use = tuple[Kind, int, int]  # of a stream, stage, microbatch
Cpu = tuple[float, float]  # CPU seconds of an event, and since the one before
Noted = tuple[int, Instruction | Phase, float, float, Cpu | None]
Sent = tuple[Message, int, float, float]  # its bytes, begin and end of sending
Received = tuple[Message, float | None, float, float]  # posted, awaited, arrived


@dataclass(kw_only=True)
class Recorder:
    """What one process saw of one step.

    `ran` are (device, instruction or phase, start, end, CPU times if known).
    """

    ran: list[Noted] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)


def step_of(
    recorders: Sequence[Recorder],
    offsets: Sequence[float],
    *,
    step: int,
    num_devices: int,
    plan: int = 0,
    origin: float = 0.0,
) -> RecordedStep:
    """Return what the ranks' `recorders` saw, with `offsets` added to their clocks.

    Times count from `origin` of the first clock.
    """
    clocks = [_OneClock(origin - offset) for offset in offsets]
    found = [
        event
        for clock, recorder in zip(clocks, recorders, strict=True)
        for event in _events(clock, recorder, range(num_devices) if len(clocks) == 1 else None)
    ]
    found.sort(key=lambda event: (event.start_ns, event.end_ns, event.device))
    messages = list(_messages(clocks, recorders, _starts(found)))
    messages.sort(key=lambda recorded: (recorded.sent_ns, recorded.message))
    return RecordedStep(
        step=step,
        num_devices=num_devices,
        plan=plan,
        events=tuple(found),
        messages=tuple(messages),
    )


@dataclass(frozen=True)
class _OneClock:
    """Turns seconds of a process's clock into what a recording has."""

    origin: float

    def __call__(self, seconds: float) -> int:
        return max(0, round((float(seconds) - self.origin) * SECOND))


def _events(
    clock: _OneClock, recorder: Recorder, devices: Iterable[int] | None
) -> Iterator[RecordedEvent]:
    """Yield what ran; a process that runs all `devices` goes through each phase for all."""
    for device, what, start, end, cpu in recorder.ran:
        event = RecordedEvent(
            device=device,
            what=what,
            start_ns=clock(start),
            end_ns=clock(end),
            cpu_ns=None if cpu is None else round(cpu[0] * SECOND),
            cpu_before_ns=None if cpu is None else round(cpu[1] * SECOND),
        )
        if isinstance(what, Phase) and devices is not None:
            yield from (replace(event, device=each) for each in devices)
        else:
            yield event


def _messages(
    clocks: Sequence[_OneClock], recorders: Sequence[Recorder], used: Mapping[_Use, int]
) -> Iterator[RecordedMessage]:
    """Yield the messages that were both sent and received."""
    taken = {
        message: (None if posted is None else clock(posted), clock(awaited), clock(arrived))
        for clock, recorder in zip(clocks, recorders, strict=True)
        for message, posted, awaited, arrived in recorder.received
    }
    for clock, recorder in zip(clocks, recorders, strict=True):
        for message, num_bytes, start, end in recorder.sent:
            if message in taken:
                posted, awaited, arrived = taken[message]
                use = message.kind, message.destination_stage, message.microbatch
                yield RecordedMessage(
                    message=message,
                    num_bytes=num_bytes,
                    sent_ns=clock(start),
                    released_ns=clock(end),
                    posted_ns=posted,
                    awaited_ns=awaited,
                    arrived_ns=arrived,
                    used_ns=used.get(use, arrived),
                )


def _starts(events: Iterable[RecordedEvent]) -> dict[_Use, int]:
    """Return when the instruction began that a stream's message is for."""
    starts: dict[_Use, int] = {}
    for event in events:
        if isinstance(what := event.what, Instruction):
            stream = KINDS[what.kind].stream
            if stream is not None:
                starts[stream.kind, what.stage, what.microbatch] = event.start_ns
    return starts
