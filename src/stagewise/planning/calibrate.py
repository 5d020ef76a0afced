"""The real costs of messages and instructions, from the timelines of trial steps.

A message between busy processes costs more than one between idle ones: the sender packs it, and
the thread that carries it waits for a core. Both show up as gaps between instructions.
Instructions cost more than their cells alone, because of the engine's overhead and cold caches.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from stagewise.costs import CellCost, InstructionCost, StageCost
from stagewise.schedule import Instruction, Kind, LoweredProgram, Message, Schedule, lower
from stagewise.schedule.instruction import KINDS
from stagewise.timeline import Span, Timeline


def message_seconds(schedule: Schedule, timelines: Sequence[Timeline]) -> tuple[float, float]:
    """Return the mean (sender's overhead, time from creation to use) per message, in seconds.

    The overhead is the gap before an instruction that did not wait: its own messages existed before
    the previous instruction began. The second counts messages for which the receiver waited; the
    two directions between a pair of devices have equal weight. 0 where nothing was observed.
    """
    overheads: list[float] = []
    waits: dict[tuple[int, int], list[float]] = defaultdict(list)  # by (source, destination)
    programs = lower(schedule)
    for timeline in timelines:
        spans = _on_one_clock(programs, timeline)
        made = {
            message: spans[step.instruction].end_seconds
            for program in programs
            for step in program
            for message in step.sends
        }
        for program in programs:
            began, free, num_sent = 0.0, 0.0, 0
            for step in program:
                span = spans[step.instruction]
                received = [message for message in step.receives if _travels(message)]
                for message in received:
                    if made[message] > free:
                        between = message.source, message.destination
                        waits[between].append(span.start_seconds - made[message])
                if num_sent and all(made[message] <= began for message in received):
                    overheads.append((span.start_seconds - free) / num_sent)
                began, free = span.start_seconds, span.end_seconds
                num_sent = sum(map(_travels, step.sends))
    return (
        statistics.fmean(overheads) if overheads else 0.0,
        max(0.0, _mean_of_pairs(waits)),
    )


def instruction_cost(costs: Sequence[StageCost], timelines: Sequence[Timeline]) -> InstructionCost:
    """Return the median time that instructions took beyond their stage's `costs`; 0 if unknown.

    If only `B` ran, its overhead is split between `I` and `W`; if only these ran, `B` gets the sum.
    """
    beyond: dict[Kind, list[float]] = defaultdict(list)
    for span in (span for timeline in timelines for span in timeline.spans):
        kind, cost = span.instruction.kind, costs[span.instruction.stage]
        beyond[kind].append(span.seconds - KINDS[kind].seconds_on(cost))
    usual = {KINDS[kind].seconds: statistics.median(found) for kind, found in beyond.items()}
    halves = "input_seconds", "weight_seconds"
    usual.setdefault("backward_seconds", sum(usual.get(half, 0) for half in halves))
    for half in halves:
        usual.setdefault(half, usual["backward_seconds"] / 2)
    known = {field.name for field in fields(InstructionCost)}
    return InstructionCost(**{name: seconds for name, seconds in usual.items() if name in known})


def with_instruction_overhead(
    cells: Sequence[CellCost], overhead: InstructionCost
) -> tuple[CellCost, ...]:
    """Return `cells` with the same instruction overhead on every stage."""
    return tuple(replace(cell, instruction_overhead=overhead) for cell in cells)


def _on_one_clock(
    programs: Sequence[LoweredProgram], timeline: Timeline
) -> dict[Instruction, Span]:
    """Return the spans on a common clock, although every device counts from its own start.

    The fastest messages between two devices are assumed to take equally long in both directions,
    as in the Network Time Protocol (Mills, IEEE Transactions on Communications, 1991).
    """
    spans = {span.instruction: span for span in timeline.spans}
    steps = [step for program in programs for step in program]
    made = {m: spans[step.instruction].end_seconds for step in steps for m in step.sends}
    fastest: dict[tuple[int, int], float] = {}
    for step in steps:
        for message in filter(_travels, step.receives):
            between = message.source, message.destination
            seconds = spans[step.instruction].start_seconds - made[message]
            fastest[between] = min(seconds, fastest.get(between, seconds))
    offset: dict[int, float] = {}  # seconds to add to a device's times
    for first in range(timeline.num_devices):
        reached = [first] if first not in offset else []
        offset.setdefault(first, 0.0)
        while reached:
            device = reached.pop()
            for (one, other), seconds in fastest.items():
                if one == device and other not in offset and (other, one) in fastest:
                    offset[other] = offset[one] + (fastest[other, one] - seconds) / 2
                    reached.append(other)
    return {
        instruction: replace(
            span,
            start_seconds=span.start_seconds + offset[span.device],
            end_seconds=span.end_seconds + offset[span.device],
        )
        for instruction, span in spans.items()
    }


def _mean_of_pairs(waits: Mapping[tuple[int, int], Sequence[float]]) -> float:
    """Return the mean over pairs of devices, only those with waits in both directions if any."""
    means = {between: statistics.fmean(seconds) for between, seconds in waits.items()}
    both = [
        (mean + means[destination, source]) / 2
        for (source, destination), mean in means.items()
        if (destination, source) in means
    ]
    return statistics.fmean(both or means.values()) if means else 0.0


def _travels(message: Message) -> bool:
    return message.source != message.destination
