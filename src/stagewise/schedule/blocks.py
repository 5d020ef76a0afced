"""Schedules from building blocks (Qi et al., arXiv:2405.15362).

Idea: fix when one microbatch is where, in slots; shift that block by a period for every further
microbatch. If on each device all slots of a block differ in their remainder by the period, no
two microbatches ever meet, whatever their number. The order in time is the program; run as early
as possible, it loses the gaps of the block at both ends ("squeezing"). How long the block's
forwards wait for their backwards decides how much memory the schedule needs.

A block here is a chain of *ways*: a microbatch's forward through chunk 0, 1, ..., then back
through ..., 1, 0, each way from device to device at a constant number of slots, on zigzag
placement. Weight gradients wait for idle slots, or until the memory is full.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from stagewise.schedule.instruction import KINDS, Instruction, Kind
from stagewise.schedule.schedule import Program


@dataclass(frozen=True, kw_only=True)
class Way:
    """A microbatch's way through one chunk, `hop` slots from one device to the next."""

    kind: Kind
    chunk: int
    hop: int

    def devices(self, num_devices: int) -> range:
        """In the order in which they are passed."""
        down = (self.chunk % 2 == 0) == (self.kind is Kind.FORWARD)
        return range(num_devices) if down else range(num_devices)[::-1]

    def stage(self, num_devices: int, device: int) -> int:
        """Of this chunk on `device`, on zigzag placement."""
        across = device if self.chunk % 2 == 0 else num_devices - 1 - device
        return self.chunk * num_devices + across


def repeated(
    num_devices: int, num_microbatches: int, ways: Sequence[Way], *, period: int
) -> tuple[Program, ...]:
    """Every device's instructions of all microbatches, in the order of their slots.

    A way starts as soon as the one before has ended and all of its slots are free.
    """
    taken: list[set[int]] = [set() for _ in range(num_devices)]
    slots: list[list[tuple[int, Way]]] = [[] for _ in range(num_devices)]
    start = 0
    for way in ways:
        passed = list(enumerate(way.devices(num_devices)))
        while any((start + i * way.hop) % period in taken[device] for i, device in passed):
            start += 1
        for i, device in passed:
            taken[device].add((start + i * way.hop) % period)
            slots[device].append((start + i * way.hop, way))
        start += (num_devices - 1) * way.hop + 1

    def program(device: int) -> Program:
        order = sorted(
            (slot + m * period, way.stage(num_devices, device), way.kind, m)
            for slot, way in slots[device]
            for m in range(num_microbatches)
        )
        return tuple(Instruction(stage, kind, m) for _, stage, kind, m in order)

    return tuple(map(program, range(num_devices)))


def with_weight_gradients(programs: Sequence[Program], limit: int) -> tuple[Program, ...]:
    """Insert the `W` of every `I`: where its device would idle, or must not hold more.

    If all instructions take one slot, at most `limit` microbatches are in flight on a device,
    those of all its stages counted, from `F` to `W`; or more, if the order of `F` and `I` alone
    needs that.
    """
    limits = [max(limit, _most_between(program)) for program in programs]
    waiting = [deque(program) for program in programs]
    deferred: list[deque[Instruction]] = [deque() for _ in programs]
    held = [0] * len(programs)
    out: list[list[Instruction]] = [[] for _ in programs]
    coming = {instruction for program in programs for instruction in program}
    while any(waiting) or any(deferred):
        running = []
        for device, order in enumerate(waiting):
            full = held[device] >= limits[device]
            if (
                order
                and not (full and order[0].kind is Kind.FORWARD)
                and _sender(order[0]) not in coming
            ):
                running.append((device, order.popleft()))
            elif deferred[device]:
                running.append((device, deferred[device].popleft()))
        assert running, "the order of F and I blocks itself"
        for device, instruction in running:
            stage, kind, m = instruction.stage, instruction.kind, instruction.microbatch
            out[device].append(instruction)
            held[device] += KINDS[kind].in_flight
            if kind is Kind.BACKWARD_INPUT:
                deferred[device].append(Instruction(stage, Kind.BACKWARD_WEIGHT, m))
            coming.discard(instruction)
    return tuple(map(tuple, out))


def _most_between(program: Program) -> int:
    """The most forwards whose `I` has not come yet."""
    level = most = 0
    for instruction in program:
        level += 1 if instruction.kind is Kind.FORWARD else -1
        most = max(most, level)
    return most


def _sender(instruction: Instruction) -> Instruction:
    """What hands it what it waits for, if there is such a stage; the rest is its device's order."""
    stream = KINDS[instruction.kind].stream
    assert stream is not None, "F and I travel"
    return Instruction(instruction.stage - stream.step, instruction.kind, instruction.microbatch)
