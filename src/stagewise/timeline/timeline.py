"""Timeline: the spans of one step, predicted or measured.

The simulator and the executor both return this type, so predictions can be compared with
measurements. Times are seconds from the start of the step. Microbatches in flight and memory over
time follow from the order of instructions and the table `KINDS`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from stagewise.costs import StageCost
from stagewise.schedule.instruction import KINDS, Instruction, Kind, KindTraits
from stagewise.units import format_seconds

Change = tuple[int, int, int, bool]  # see `_changes`
Changes = Mapping[Kind, Sequence[Change]]  # by kind and stage


@dataclass(frozen=True, kw_only=True)
class Span:
    """One instruction as it ran on a device."""

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

    def __repr__(self) -> str:
        return (
            f"<Timeline of {len(self.spans)} instructions on {self.num_devices} devices: "
            f"{format_seconds(float(self.duration_seconds))}, bubble {self.bubble_fraction:.1%}>"
        )

    def _repr_html_(self) -> str:
        from stagewise.timeline.notebook_picture import timeline_in_html

        return timeline_in_html(self)

    def show(self, width: int | None = None) -> None:
        """Print the timeline as a picture: a row per device, time to the right.

        It is as wide as the terminal, unless `width` is given in characters.
        """
        from rich.console import Console

        from stagewise.timeline.timeline_picture import render_timeline

        console = Console(width=width)
        console.print(render_timeline(self, width=console.width))

    @cached_property
    def duration_seconds(self) -> float:
        """End of the last span."""
        return max((span.end_seconds for span in self.spans), default=0)

    @property
    def microbatches(self) -> set[int]:
        """The numbers of those that ran."""
        every = (span.instruction for span in self.spans)
        return {i.microbatch for i in every if not KINDS[i.kind].of_shards}

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """The time each device spent in instructions."""
        return tuple(
            sum(span.seconds for span in self.spans if span.device == device)
            for device in range(self.num_devices)
        )

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all devices' time; (K-1)/(M+K-1) for GPipe on equal stages."""
        total = self.num_devices * self.duration_seconds
        return (total - sum(self.busy_seconds)) / total if total else 0

    def in_flight(self, device: int) -> Curve:
        """Return the microbatches between start of forward and end of backward, over time."""
        kinds = {(span.instruction.stage, span.instruction.kind) for span in self.spans}
        backward = {stage for stage, kind in kinds if KINDS[kind].is_backward}

        def changes(program: list[Instruction]) -> Iterator[int]:
            for i in program:  # a stage without backward among others with one keeps nothing
                yield KINDS[i.kind].in_flight if i.stage in backward or not backward else 0

        return self._curve(device, changes)

    def peak_in_flight(self, device: int) -> int:
        """Return the largest number of microbatches in flight on `device`."""
        return max((count for _, count in self.in_flight(device)), default=0)

    def activation_bytes(self, device: int, costs: Sequence[StageCost]) -> Curve:
        """Return the bytes kept for the backward on `device` over time; `costs` are per stage."""
        return self._curve(device, lambda program: kept_bytes(program, costs))

    def peak_activation_bytes(self, costs: Sequence[StageCost]) -> tuple[int, ...]:
        """Return each device's maximum of `activation_bytes`."""
        return tuple(
            max((value for _, value in self.activation_bytes(device, costs)), default=0)
            for device in range(self.num_devices)
        )

    def to_records(self) -> list[SpanRecord]:
        """Return the spans as JSON-ready dictionaries."""
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
        """Build a timeline from what `to_records` returned."""
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
        """Return the running sum of the `changes` that a program's instructions make.

        Increases count from an instruction's start, decreases from its end. A device runs one
        instruction at a time, so the curve is in order even if an instruction takes no time.
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


def changes_by_kind(costs: Sequence[StageCost]) -> Changes:
    """Return what every kind changes on every stage, for several calls of `kept_bytes`."""
    released = [0, *(cost.released_output_bytes for cost in costs[:-1])]
    return {
        kind: [_changes(traits, *each) for each in zip(costs, released, strict=True)]
        for kind, traits in KINDS.items()
    }


def kept_bytes(
    program: Collection[Instruction], costs: Sequence[StageCost], changes: Changes | None = None
) -> Iterator[int]:
    """Yield by how many bytes each instruction of a device changes what is kept for the backward.

    If two neighbouring stages share a device, the input of the second is the output of the first:
    what the first keeps of it is counted once, until both have released it, unless the first
    recomputes.
    """
    changes = changes_by_kind(costs) if changes is None else changes
    forward, recompute, weights = Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD_WEIGHT
    recomputed = {(i.stage, i.microbatch) for i in program if i.kind is recompute}
    lend = {(i.stage, i.microbatch) for i in program if i.kind is forward} - recomputed
    gone: set[tuple[int, int]] = set()  # graphs that were freed
    waiting: set[tuple[int, int]] = set()  # for `W`
    reduced = {i.stage for i in program if i.kind is Kind.REDUCE}  # before the first gradients
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
                by -= changes[weights][stage + 1][2]
        if of_waiting > 0:
            waiting.add(own)
        elif of_waiting:
            waiting.discard(own)
        if stage in reduced and KINDS[i.kind].keeps_once:
            reduced.discard(stage)
            by += sum(getattr(costs[stage], name) for name in KINDS[i.kind].keeps_once)
        yield by


def _changes(traits: KindTraits, cost: StageCost, released: int) -> Change:
    """Return the change in bytes kept, the parts that may be shared with the stage before (the
    input, and the input waiting for `W`), and whether the instruction frees the graph.

    The stage before has `released` bytes of the input, which are not shared.
    """
    of_input = ("input_bytes" in traits.keeps) - ("input_bytes" in traits.frees)
    of_waiting = ("deferred_bytes" in traits.keeps) - ("deferred_bytes" in traits.frees)
    return (
        traits.bytes_kept(cost) - traits.bytes_freed(cost),
        of_input * max(0, cost.input_bytes - released),
        of_waiting * max(0, cost.deferred_input_bytes - released),
        "activation_bytes" in traits.frees,
    )
