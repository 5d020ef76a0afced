"""One Timeline for what was predicted and what was measured.

The simulator and the executor both give this type, so every prediction is compared with
reality. Times are seconds from the start of the step; `B` of a microbatch frees what its `F`
(or `R`) holds, which gives microbatches in flight and memory over time.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from stagewise.costs import StageCost
from stagewise.schedule.instruction import KINDS, Instruction, Kind, KindTraits


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
        return self._curve(device, lambda program: (KINDS[i.kind].in_flight for i in program))

    def peak_in_flight(self, device: int) -> int:
        """The most microbatches in flight on `device`."""
        return max((count for _, count in self.in_flight(device)), default=0)

    def activation_bytes(self, device: int, costs: Sequence[StageCost]) -> Curve:
        """Bytes kept for the backward pass on `device` over time; `costs` per stage."""
        return self._curve(device, lambda program: kept_bytes(program, costs))

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

    def _curve(self, device: int, changes: Callable[[list[Instruction]], Iterable[int]]) -> Curve:
        """Running sum of the `changes` that a program's instructions make.

        Rises count from an instruction's start, falls from its end. A device runs one at a time,
        so its spans in order give the curve in order, also where an instruction takes no time.
        """
        own = sorted(
            (span for span in self.spans if span.device == device),
            key=lambda span: (span.start_seconds, span.end_seconds),
        )
        level, curve = 0, []
        for span, by in zip(own, changes([span.instruction for span in own]), strict=True):
            if by:
                level += by
                curve.append((span.start_seconds if by > 0 else span.end_seconds, level))
        return tuple(curve)


def kept_bytes(program: Collection[Instruction], costs: Sequence[StageCost]) -> Iterator[int]:
    """By how many bytes each instruction of a device changes what it keeps for the backward pass.

    What a stage is given by one on the same device is that one's output: it is kept once, unless
    the giving stage drops it and recomputes; by whichever of the two needs it longer.
    """
    stages = {i.stage for i in program}
    changes = {kind: {s: _changes(t, costs[s]) for s in stages} for kind, t in KINDS.items()}
    forward, recompute = Kind.FORWARD, Kind.RECOMPUTE
    recomputed = {(i.stage, i.microbatch) for i in program if i.kind is recompute}
    lend = {(i.stage, i.microbatch) for i in program if i.kind is forward} - recomputed
    gone: set[tuple[int, int]] = set()  # graphs that ran backward
    waiting: set[tuple[int, int]] = set()  # for `W`
    for i in program:
        own = stage, m = i.stage, i.microbatch
        giver = stage - 1, m
        by, of_input, of_waiting, frees_graph = changes[i.kind][stage]
        if own in recomputed and i.kind is forward:
            by -= changes[recompute][stage][0]
        if giver in lend:
            by -= of_input
            if giver not in gone:
                by -= of_waiting
        if frees_graph:
            gone.add(own)
            if own in lend and (stage + 1, m) in waiting:
                by += costs[stage + 1].deferred_input_bytes
        if of_waiting > 0:
            waiting.add(own)
        elif of_waiting:
            waiting.discard(own)
        yield by


def _changes(traits: KindTraits, cost: StageCost) -> tuple[int, int, int, bool]:
    """By how much an instruction changes what is kept, and the parts of that which may be lent:
    the input, and the input as far as it waits for `W`; and whether it frees the graph."""
    kept = sum([getattr(cost, field) for field in traits.keeps])
    freed = sum([getattr(cost, field) for field in traits.frees])
    of_input = ("input_bytes" in traits.keeps) - ("input_bytes" in traits.frees)
    of_waiting = ("deferred_bytes" in traits.keeps) - ("deferred_bytes" in traits.frees)
    return (
        kept - freed,
        of_input * cost.input_bytes,
        of_waiting * cost.deferred_input_bytes,
        "activation_bytes" in traits.frees,
    )
