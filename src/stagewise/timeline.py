"""One Timeline for what was predicted and what was measured.

The simulator and the executor both give this type, so every prediction is compared with
reality. Times are seconds from the start of the step; `B` of a microbatch frees what its `F`
(or `R`) holds, which gives microbatches in flight and memory over time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from stagewise.costs import StageCost
from stagewise.schedule.instruction import Instruction, Kind


@dataclass(frozen=True, kw_only=True)
class Span:
    """One instruction's run on one device."""

    device: int
    instruction: Instruction
    start_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds


class SpanRecord(TypedDict):
    """A span as JSON."""

    device: int
    instruction: str
    start_seconds: float
    end_seconds: float


Curve = tuple[tuple[float, int], ...]  # (time in seconds, value from then on)


@dataclass(frozen=True)
class Timeline:
    """The spans of one step on `num_devices` devices."""

    num_devices: int
    spans: tuple[Span, ...]

    @cached_property
    def duration_seconds(self) -> float:
        """End of the last span."""
        return max((span.end_seconds for span in self.spans), default=0)

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """Per device: the time spent in instructions."""
        return tuple(
            sum(span.seconds for span in self.spans if span.device == device)
            for device in range(self.num_devices)
        )

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all devices' time; (K-1)/(M+K-1) for GPipe on equal stages."""
        total = self.num_devices * self.duration_seconds
        return (total - sum(self.busy_seconds)) / total if total else 0

    def in_flight(self, device: int) -> Curve:
        """Microbatches whose forward has begun and whose backward has not ended, over time."""
        return self._curve(device, lambda i: _IN_FLIGHT.get(i.kind, 0))

    def peak_in_flight(self, device: int) -> int:
        """The most microbatches in flight on `device`."""
        return max((count for _, count in self.in_flight(device)), default=0)

    def activation_bytes(self, device: int, costs: Sequence[StageCost]) -> Curve:
        """Bytes kept for the backward pass on `device` over time; `costs` per stage.

        What a stage is given by one on the same device is that one's output: it is kept once,
        unless the giving stage drops it and recomputes; by whichever of the two needs it longer.
        """
        recomputed = {
            (s.instruction.stage, s.instruction.microbatch)
            for s in self.spans
            if s.instruction.kind is Kind.RECOMPUTE
        }
        kept_here = {
            (s.instruction.stage, s.instruction.microbatch)
            for s in self.spans
            if s.instruction.kind is Kind.FORWARD and s.device == device
        } - recomputed
        done: set[tuple[int, int]] = set()  # their activations are gone
        waiting: set[tuple[int, int]] = set()  # for `W`

        def change(i: Instruction) -> int:
            cost, it = costs[i.stage], (i.stage, i.microbatch)
            given = 0 if (i.stage - 1, i.microbatch) in kept_here else cost.input_bytes
            if i.kind is Kind.FORWARD:
                stored = (i.stage, i.microbatch) in recomputed
                return given + (0 if stored else cost.activation_bytes)
            if i.kind is Kind.RECOMPUTE:
                return cost.activation_bytes
            giver, taker = (i.stage - 1, i.microbatch), (i.stage + 1, i.microbatch)
            lent = cost.deferred_input_bytes * (giver in kept_here and giver not in done)
            if i.kind is Kind.BACKWARD_WEIGHT:
                waiting.discard(it)
                return lent - cost.deferred_bytes
            done.add(it)
            whole = given + cost.activation_bytes
            if it in kept_here and taker in waiting:
                whole -= costs[i.stage + 1].deferred_input_bytes
            if i.kind is Kind.BACKWARD_INPUT:
                waiting.add(it)
                return cost.deferred_bytes - lent - whole
            return -whole

        return self._curve(device, change)

    def peak_activation_bytes(self, costs: Sequence[StageCost]) -> tuple[int, ...]:
        """Per device: the highest point of its `activation_bytes` curve."""
        return tuple(
            max((value for _, value in self.activation_bytes(device, costs)), default=0)
            for device in range(self.num_devices)
        )

    def to_records(self) -> list[SpanRecord]:
        """Spans as JSON-ready dictionaries."""
        return [
            {
                "device": span.device,
                "instruction": str(span.instruction),
                "start_seconds": float(span.start_seconds),
                "end_seconds": float(span.end_seconds),
            }
            for span in self.spans
        ]

    @staticmethod
    def from_records(num_devices: int, records: Sequence[SpanRecord]) -> "Timeline":
        """The inverse of `to_records`."""
        return Timeline(
            num_devices,
            tuple(
                Span(
                    device=record["device"],
                    instruction=Instruction.parse(record["instruction"]),
                    start_seconds=record["start_seconds"],
                    end_seconds=record["end_seconds"],
                )
                for record in records
            ),
        )

    def _curve(self, device: int, change: Callable[[Instruction], int]) -> Curve:
        """Running sum of `change` per instruction: rises count from its start, falls from its end.

        A device runs one instruction at a time, so its spans in order give the curve in order,
        also where an instruction takes no time.
        """
        own = (span for span in self.spans if span.device == device)
        level, curve = 0, []
        for span in sorted(own, key=lambda span: (span.start_seconds, span.end_seconds)):
            if by := change(span.instruction):
                level += by
                curve.append((span.start_seconds if by > 0 else span.end_seconds, level))
        return tuple(curve)


_IN_FLIGHT = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_WEIGHT: -1}
