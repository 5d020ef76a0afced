"""Schedules from building blocks (Qi et al., arXiv:2405.15362).

Idea: fix the time slots of one microbatch (its block), and repeat the block with a constant period
for every further microbatch. If a block's slots on each device differ modulo the period, two
microbatches never claim the same slot, however many there are. The program is the slots in order
of time; run as early as possible, it closes the block's gaps at both ends ("squeezing"). The time
between a block's forwards and their backwards decides how much memory the schedule needs.

A block here is a sequence of *passes* on zigzag placement: a microbatch's forward through chunk 0,
1, ..., then its backward through ..., 1, 0, each pass moving from device to device at a constant
number of slots. Weight gradients fill idle slots, or run when the memory limit is reached.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from stagewise.schedule.instruction import KINDS, Instruction, Kind
from stagewise.schedule.schedule import Program


@dataclass(frozen=True, kw_only=True)
class ChunkPass:
    """One microbatch's pass through a chunk, `hop` slots from one device to the next."""

    kind: Kind
    chunk: int
    hop: int

    def devices(self, num_devices: int) -> range:
        """Return the devices in the order in which the pass visits them."""
        down = (self.chunk % 2 == 0) == (self.kind is Kind.FORWARD)
        return range(num_devices) if down else range(num_devices)[::-1]

    def stage(self, num_devices: int, device: int) -> int:
        """Return the stage of this chunk that zigzag placement puts on `device`."""
        across = device if self.chunk % 2 == 0 else num_devices - 1 - device
        return self.chunk * num_devices + across


def repeat_block(
    num_devices: int, num_microbatches: int, block: Sequence[ChunkPass], *, period: int
) -> tuple[Program, ...]:
    """Return every device's program: the block of each microbatch, in order of time slots.

    A pass starts as soon as the one before has ended and all of its slots are free.
    """
    taken: list[set[int]] = [set() for _ in range(num_devices)]
    slots: list[list[tuple[int, ChunkPass]]] = [[] for _ in range(num_devices)]
    start = 0
    for one in block:
        visited = list(enumerate(one.devices(num_devices)))
        while any((start + i * one.hop) % period in taken[device] for i, device in visited):
            start += 1
        for i, device in visited:
            taken[device].add((start + i * one.hop) % period)
            slots[device].append((start + i * one.hop, one))
        start += (num_devices - 1) * one.hop + 1

    def program(device: int) -> Program:
        order = sorted(
            (slot + m * period, one.stage(num_devices, device), one.kind, m)
            for slot, one in slots[device]
            for m in range(num_microbatches)
        )
        return tuple(Instruction(stage, kind, m) for _, stage, kind, m in order)

    return tuple(map(program, range(num_devices)))


def with_weight_gradients(programs: Sequence[Program], limit: int) -> tuple[Program, ...]:
    """Insert the `W` of every `I` where its device would idle or has reached the memory limit.

    If every instruction takes one slot, each device has at most `limit` microbatches in flight
    (from `F` to `W`, summed over its stages), or as many as the order of `F` and `I` alone needs.
    """
    limits = [max(limit, _peak_before_input_gradient(program)) for program in programs]
    waiting = [deque(program) for program in programs]
    deferred: list[deque[Instruction]] = [deque() for _ in programs]
    held = [0] * len(programs)
    out: list[list[Instruction]] = [[] for _ in programs]
    pending = {instruction for program in programs for instruction in program}
    while any(waiting) or any(deferred):
        running = []
        for device, order in enumerate(waiting):
            full = held[device] >= limits[device]
            if (
                order
                and not (full and order[0].kind is Kind.FORWARD)
                and _sender(order[0]) not in pending
            ):
                running.append((device, order.popleft()))
            elif deferred[device]:
                running.append((device, deferred[device].popleft()))
        assert running, "the order of F and I deadlocks"
        for device, instruction in running:
            stage, kind, m = instruction.stage, instruction.kind, instruction.microbatch
            out[device].append(instruction)
            held[device] += KINDS[kind].in_flight
            if kind is Kind.BACKWARD_INPUT:
                deferred[device].append(Instruction(stage, Kind.BACKWARD_WEIGHT, m))
            pending.discard(instruction)
    return tuple(map(tuple, out))


def _peak_before_input_gradient(program: Program) -> int:
    """Return the largest number of microbatches between `F` and `I` at any time."""
    level = most = 0
    for instruction in program:
        level += 1 if instruction.kind is Kind.FORWARD else -1
        most = max(most, level)
    return most


def _sender(instruction: Instruction) -> Instruction:
    """Return the neighbour's instruction that sends what this one waits for, if there is one."""
    stream = KINDS[instruction.kind].stream
    assert stream is not None, "F and I receive from a neighbour"
    return Instruction(instruction.stage - stream.step, instruction.kind, instruction.microbatch)
