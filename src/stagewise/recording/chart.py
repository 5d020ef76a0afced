"""What every device did, or waited for, at every instant of a step.

A device's time is cut into segments: it works, it is idle for a cause that is found there, or it
waits for another device; that chain is followed to its end.
"""

import enum
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stagewise.recording.recorded import Phase, RecordedEvent, RecordedMessage, RecordedStep
from stagewise.schedule import Instruction
from stagewise.schedule.instruction import KINDS


class Cause(enum.StrEnum):
    """Why a device was idle."""

    FILL_AND_DRAIN = "fill and drain"
    UNEQUAL_STAGES = "unequal stages"
    TRANSFERS = "transfers"  # sends, or waits for what another has sent
    DATA = "data loading"  # and what else the user's loop does between calls
    OVERHEAD = "launch overhead"  # of instructions, and of agreeing on the call
    REDUCTION = "reduction"  # of losses and gradients, after the last rank is there
    HOST = "host"  # the thread had no core, where it had no one to wait for
    TURNS = "one process"  # which runs all devices in turn


_WORKS = "works"
_Reason = Cause | int | str  # a cause; the device that is waited for; or _WORKS
_Segment = tuple[int, int, _Reason]  # from, until


@dataclass(frozen=True, kw_only=True)
class IdleSpan:
    """A stretch of a device's idle time; `device_awaited` is whom it waited for, if anybody."""

    device: int
    start_ns: int
    end_ns: int
    cause: Cause
    device_awaited: int | None = None


class Chart:
    """What every device did, or waited for, at every instant of its window."""

    def __init__(self, step: RecordedStep, takes_turns: bool) -> None:
        self._step, self._takes_turns = step, takes_turns
        self.devices = range(step.num_devices)
        self._events: list[list[RecordedEvent]] = [[] for _ in self.devices]
        for event in step.events:
            self._events[event.device].append(event)
        for own in self._events:
            own.sort(key=lambda event: (event.start_ns, event.end_ns))
        self._has_phases = any(isinstance(event.what, Phase) for event in step.events)
        self._sent: list[list[RecordedMessage]] = [[] for _ in self.devices]
        self._taken: dict[tuple[int, str, int, int], list[RecordedMessage]] = defaultdict(list)
        for message in step.messages:
            it = message.message
            self._sent[it.source].append(message)
            use = it.destination, str(it.kind), it.destination_stage, it.microbatch
            self._taken[use].append(message)
        self._last = {phase: self._last_into(phase) for phase in (Phase.AGREE, Phase.REDUCE)}
        ends = [(own[-1].end_ns, d) for d, own in enumerate(self._events) if own]
        self._last_device = max(ends, default=(0, 0))[1]
        self._spent = [{Instruction: 0, Phase: 0} for _ in self.devices]
        self._segments = [list(self._segments_of(device)) for device in self.devices]
        self._starts = [[start for start, *_ in own] for own in self._segments]

    def start(self, device: int) -> int:
        own = self._events[device]
        return own[0].start_ns if own and self._has_phases else self._step.start_ns

    def end(self, device: int) -> int:
        own = self._events[device]
        if own and self._has_phases:
            return max(event.end_ns for event in own)
        return self._step.end_ns

    def seconds(self, device: int, kind: type[Instruction | Phase]) -> int:
        """Return the nanoseconds in instructions, or in the optimizer."""
        return self._spent[device][kind]

    def lost(self, device: int) -> int:
        return sum(
            max(0, event.end_ns - event.start_ns - event.cpu_ns)
            for event in self._events[device]
            if isinstance(event.what, Instruction) and event.cpu_ns is not None
        )

    def waits(self, device: int) -> Iterator[IdleSpan]:
        """Yield the idle time of `device`; waits for work have the cause FILL_AND_DRAIN."""
        for start, end, reason in self._segments[device]:
            if reason == _WORKS or end <= start:
                continue
            awaited = reason if isinstance(reason, int) else None
            for begin, until, cause in self._resolved(start, end, reason, {device}):
                yield IdleSpan(
                    device=device,
                    start_ns=begin,
                    end_ns=until,
                    cause=cause,
                    device_awaited=awaited,
                )

    def _resolved(
        self, start: int, end: int, reason: _Reason, chain: set[int]
    ) -> Iterator[tuple[int, int, Cause]]:
        """Follow who waits for whom, from `start` to `end`, to the causes at the end."""
        if isinstance(reason, Cause):
            yield start, end, reason
        elif isinstance(reason, str):
            yield start, end, Cause.FILL_AND_DRAIN
        elif reason in chain:  # clocks are a little apart: each says that the other is late
            yield start, end, Cause.TRANSFERS
        else:
            at, own = start, self._segments[reason]
            for begin, until, why in own[max(0, bisect_right(self._starts[reason], start) - 1) :]:
                if begin >= end:
                    break
                if until <= at:
                    continue
                if begin > at:  # it was still busy with the step before
                    yield at, begin, Cause.FILL_AND_DRAIN
                    at = begin
                yield from self._resolved(at, min(until, end), why, chain | {reason})
                at = min(until, end)
            if at < end:
                yield at, end, Cause.OVERHEAD  # after all that is known of it

    def _segments_of(self, device: int) -> Iterator[_Segment]:
        at = self.start(device)
        for event in self._events[device]:
            start = max(event.start_ns, at)
            if start > at:
                yield from self._gap(device, at, start, event)
            end = max(event.end_ns, start)
            yield from self._during(device, start, end, event.what)
            at = end
        if at < self.end(device):
            yield at, self.end(device), self._last_device

    def _during(
        self, device: int, start: int, end: int, what: Instruction | Phase
    ) -> Iterator[_Segment]:
        if isinstance(what, Instruction) or what is Phase.OPTIMIZER:
            self._spent[device][Instruction if isinstance(what, Instruction) else Phase] += (
                end - start
            )
            yield start, end, _WORKS
            return
        if what is Phase.DATA:
            yield start, end, Cause.DATA
            return
        late, whom = self._last[what]
        until = min(max(late, start), end) if whom != device else start
        if until > start:
            yield start, until, Cause.TURNS if self._takes_turns else whom
        yield until, end, Cause.OVERHEAD if what is Phase.AGREE else Cause.REDUCTION

    def _last_into(self, phase: Phase) -> tuple[int, int]:
        """Return when, and which device, entered a phase last."""
        begun = [
            (event.start_ns, device)
            for device, own in enumerate(self._events)
            for event in own
            if event.what is phase
        ]
        return max(begun, default=(0, 0))

    def _gap(self, device: int, start: int, end: int, event: RecordedEvent) -> Iterator[_Segment]:
        """Yield what a device waited for between two events."""
        at, free = start, 0  # free: of a core
        parts: list[_Segment] = []
        for begin, until, reason in sorted(self._claims(device, start, end, event), key=_begin):
            begin, until = max(begin, at), min(until, end)
            if until <= begin:
                continue
            if begin > at:
                parts.append((at, begin, Cause.OVERHEAD))
            parts.append((begin, until, reason))
            at = until
        if at < end:
            parts.append((at, end, Cause.OVERHEAD))
        if event.cpu_before_ns is not None:
            ours = sum(until - begin for begin, until, why in parts if why is Cause.OVERHEAD)
            free = max(0, ours - event.cpu_before_ns)
        for begin, until, why in parts:
            taken = min(free, until - begin) if why is Cause.OVERHEAD else 0
            free -= taken
            if taken:
                yield begin, begin + taken, Cause.HOST
            yield begin + taken, until, why

    def _claims(
        self, device: int, start: int, end: int, event: RecordedEvent
    ) -> Iterator[_Segment]:
        """Yield what is known of a gap before `event`, in any order."""
        if self._takes_turns:
            for other in self._events:
                for each in other:
                    if each.device != device and isinstance(each.what, Instruction):
                        yield each.start_ns, each.end_ns, Cause.TURNS
            return
        for message in self._sent[device]:
            if message.released_ns > start and message.sent_ns < end:
                yield message.sent_ns, message.released_ns, Cause.TRANSFERS
        if not isinstance(what := event.what, Instruction):
            return
        stream = KINDS[what.kind].stream
        use = device, "" if stream is None else str(stream.kind), what.stage, what.microbatch
        for message in self._taken.get(use, ()):
            begun = start if message.awaited_ns is None else message.awaited_ns
            made = min(max(begun, message.sent_ns), message.arrived_ns)
            yield begun, made, message.message.source
            yield made, message.arrived_ns, Cause.TRANSFERS


def _begin(segment: Sequence[object]) -> tuple[int, int]:
    return segment[0], segment[1]  # type: ignore[return-value]
