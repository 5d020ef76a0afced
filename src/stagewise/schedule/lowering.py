"""Lowering: what is needed at all, which tensor is sent where, and in which order on each link.

A published schedule has a backward on every stage, though nothing is trained before the first
adapter of a fine-tuned model, and a frozen stage has no gradients of weights. What is `needed`
alone is in the programs, so that executor, simulator, memory forecast and pictures follow.

Every instruction gets the messages it waits for and the messages it sends. Messages between two
devices travel on their link in the order in which the source device's program sends them, so the
receiver can post its receives ahead of time, without tags.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from stagewise.costs import StageCost, num_untrained
from stagewise.schedule.instruction import (
    ACTIVATIONS,
    GRADIENTS,
    KINDS,
    Instruction,
    Kind,
    Stream,
)
from stagewise.schedule.schedule import Program, Schedule


class Message(NamedTuple):  # a tuple, because it is hashed often
    """What one instruction sends to another stage: activations or gradients.

    Skips between neighbouring stages travel with the boundary's values, others in messages of
    their own.
    """

    kind: Kind  # of the stream
    microbatch: int
    source_stage: int
    destination_stage: int
    source: int  # device
    destination: int  # device

    @property
    def distance(self) -> int:
        """Number of stages travelled: 1 between neighbours, more for a skip past other stages."""
        return abs(self.destination_stage - self.source_stage)

    def __str__(self) -> str:
        what = next(stream.name for stream in (ACTIVATIONS, GRADIENTS) if stream.kind is self.kind)
        return (
            f"{what} of microbatch {self.microbatch}, stage {self.source_stage} "
            f"-> {self.destination_stage} (device {self.source} -> {self.destination})"
        )


@dataclass(frozen=True)
class Step:
    """An instruction with what it receives before and sends after."""

    instruction: Instruction
    receives: tuple[Message, ...]
    sends: tuple[Message, ...]


LoweredProgram = tuple[Step, ...]
_NOT_FORWARD = frozenset(Kind) - {Kind.FORWARD}
_HALVES = Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT


def needed(schedule: Schedule, first_trained: int, untrained: Collection[int] = ()) -> Schedule:
    """Return `schedule` without what is not needed if nothing before stage `first_trained` is
    trained, nor anything on the `untrained` stages.

    The former only run forwards; the latter's `I` is a whole backward, `B`, without a `W`.

    >>> from stagewise.schedule import parse_schedule
    >>> print(needed(parse_schedule("two", "0F0 0I0 0W0\\n1F0 1I0 1W0"), 1, {1}))
    0F0
    1F0 1B0
    """
    if not first_trained and not untrained:
        return schedule
    frozen = frozenset(untrained)

    def kept(program: Program) -> Iterator[Instruction]:
        for i in program:
            if i.stage < first_trained and i.kind in _NOT_FORWARD:
                continue
            if i.stage not in frozen or i.kind not in _HALVES:
                yield i
            elif i.kind is Kind.BACKWARD_INPUT:
                yield replace(i, kind=Kind.BACKWARD)

    programs = tuple(tuple(kept(program)) for program in schedule.programs)
    return replace(schedule, programs=programs, first_trained=first_trained)


def needed_for(schedule: Schedule, costs: Sequence[StageCost]) -> Schedule:
    """Return `schedule` without what stages of these costs do not need."""
    untrained = {stage for stage, cost in enumerate(costs) if cost.trainable_bytes == 0}
    return needed(schedule, num_untrained(costs), untrained)


def lower(schedule: Schedule, flows: Iterable[tuple[int, int]] = ()) -> tuple[LoweredProgram, ...]:
    """Add receives and sends to every instruction of a valid schedule.

    `flows` are the (source, destination) stages of skips that pass other stages. Their destination
    already waits for its neighbour, which waits for the source, so they cannot deadlock a valid
    schedule. An instruction's messages are in order of distance.
    """
    targets: dict[tuple[Kind, int], list[int]] = defaultdict(list)
    for source, destination in sorted(flows, key=lambda flow: flow[1] - flow[0]):
        targets[ACTIVATIONS.kind, source].append(destination)
        targets[GRADIENTS.kind, destination].append(source)
    awaited: dict[tuple[Kind, int, int], list[Message]] = defaultdict(list)
    sent: dict[Instruction, tuple[Message, ...]] = {}
    for _, instruction in schedule.instructions():
        stream, stage, m = KINDS[instruction.kind].stream, instruction.stage, instruction.microbatch
        if stream is None or not 0 <= stage + stream.step < schedule.num_stages:
            continue
        source, lowest = schedule.device_of(stage, m), lowest_target(stream, schedule)
        sent[instruction] = tuple(
            Message(stream.kind, m, stage, target, source, schedule.device_of(target, m))
            for target in (stage + stream.step, *targets.get((stream.kind, stage), ()))
            if target >= lowest
        )
        for message in sent[instruction]:
            awaited[stream.kind, message.destination_stage, m].append(message)

    def step(instruction: Instruction) -> Step:
        stream = KINDS[instruction.kind].stream
        place = instruction.stage, instruction.microbatch
        receives = awaited.get((stream.kind, *place), []) if stream else []
        return Step(
            instruction,
            tuple(sorted(receives, key=lambda message: message.distance)),
            sent.get(instruction, ()),
        )

    return tuple(tuple(map(step, program)) for program in schedule.programs)


def lowest_target(stream: Stream, schedule: Schedule) -> int:
    """Return the first stage that messages of `stream` are sent to."""
    return schedule.first_trained if stream is GRADIENTS else 0


def links(programs: tuple[LoweredProgram, ...]) -> dict[tuple[int, int], tuple[Message, ...]]:
    """Return the messages of every (source, destination) device pair in sending order."""
    order: dict[tuple[int, int], list[Message]] = defaultdict(list)
    for program in programs:
        for step in program:
            for message in step.sends:
                if message.source != message.destination:
                    order[message.source, message.destination].append(message)
    return {link: tuple(messages) for link, messages in order.items()}
