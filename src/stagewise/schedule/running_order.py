"""Running order: visit every instruction after everything it waits for.

Any such order gives the same start times, because a device keeps its program's order and a link
its sender's; the validator, the grid and the simulator therefore share this walk.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from stagewise.schedule.lowering import LoweredProgram, Message, Step, lower
from stagewise.schedule.schedule import Schedule


class Blocked(Exception):
    """The programs are deadlocked; `positions[d]` is where device d waits."""

    def __init__(self, positions: tuple[int, ...]) -> None:
        super().__init__(f"blocked at {positions}")
        self.positions = positions


def walk(programs: Sequence[LoweredProgram]) -> Iterator[tuple[int, Step]]:
    """Yield (device, step), each after everything it waits for; raise Blocked on a deadlock."""
    positions = [0] * len(programs)
    arrived: set[Message] = set()
    waiting: dict[Message, int] = {}
    ready = deque(range(len(programs)))
    while ready:
        device = ready.popleft()
        program = programs[device]
        while positions[device] < len(program):
            step = program[positions[device]]
            missing = next((m for m in step.receives if m not in arrived), None)
            if missing is not None:
                waiting[missing] = device
                break
            yield device, step
            positions[device] += 1
            for message in step.sends:
                arrived.add(message)
                if message in waiting:
                    ready.append(waiting.pop(message))
    if any(at < len(program) for at, program in zip(positions, programs, strict=True)):
        raise Blocked(tuple(positions))


def slots(schedule: Schedule) -> list[list[int]]:
    """Return the start slot of instruction i of device d as `[d][i]`, if each takes one slot."""
    arrival: dict[Message, int] = {}
    starts: list[list[int]] = [[] for _ in schedule.programs]
    for device, step in walk(lower(schedule)):
        free = starts[device][-1] + 1 if starts[device] else 0
        start = max([free, *(arrival[m] for m in step.receives)])
        starts[device].append(start)
        arrival.update(dict.fromkeys(step.sends, start + 1))
    return starts
