"""How long a schedule takes and what it keeps, without the Timeline: what a search can afford.

The additions are those of `simulate` and `Timeline.activation_bytes`, in their order, so the
numbers are equal, not close. One pass over the programs, arrivals in flat lists, no objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.errors import ScheduleError
from stagewise.mesh import device_turns
from stagewise.schedule import Schedule
from stagewise.schedule.instruction import ACTIVATIONS, GRADIENTS, KINDS, Stream
from stagewise.timeline import kept_bytes

_NEVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The seconds of a step, and each device's last end, busy time and peak activations."""

    seconds: float
    end_seconds: tuple[float, ...]
    busy_seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]


def outcome_of(
    schedule: Schedule, costs: Sequence[StageCost], link: LinkCost = FREE_LINK
) -> Outcome:
    """`simulate(...).duration_seconds`, `.busy_seconds` and `.peak_activation_bytes(costs)`."""
    ends, busy = _ends_and_busy(schedule, costs, link)
    return Outcome(
        seconds=max(ends),
        end_seconds=tuple(ends),
        busy_seconds=tuple(busy),
        peak_bytes=peak_bytes(schedule, costs),
    )


class _Road:
    """What a stream brings where, by stage and microbatch: when, or who waits for it."""

    def __init__(
        self, stream: Stream, schedule: Schedule, costs: Sequence[StageCost], link: LinkCost
    ) -> None:
        stages, self.step = range(schedule.num_stages), stream.step
        self.seconds = [
            stream.seconds(stage, costs, link) if stage + stream.step in stages else 0
            for stage in stages
        ]
        self.arrived: list[float] = [
            _NEVER if stage - stream.step in stages else 0
            for stage in stages
            for _ in range(schedule.num_microbatches)
        ]
        self.waiting: dict[int, int] = {}


def _ends_and_busy(
    schedule: Schedule, costs: Sequence[StageCost], link: LinkCost
) -> tuple[list[float], list[float]]:
    num_stages, num_microbatches = schedule.num_stages, schedule.num_microbatches
    roads: dict[Stream | None, _Road] = {
        stream: _Road(stream, schedule, costs, link) for stream in (ACTIVATIONS, GRADIENTS)
    }
    kinds = {
        kind: ([traits.seconds_on(cost) for cost in costs], roads.get(traits.stream))
        for kind, traits in KINDS.items()
    }
    overhead = link.overhead_seconds
    placement = schedule.placement
    runs_on = [d for devices in placement for d in device_turns(devices, num_microbatches)]
    nothing: list[float] = [0] * schedule.num_devices
    free, last, busy = [*nothing], [*nothing], [*nothing]
    link_free: dict[tuple[int, int], float] = {}
    at, ready = [0] * schedule.num_devices, list(range(schedule.num_devices))
    while ready:
        device = ready.pop()
        program, i, now = schedule.programs[device], at[device], free[device]
        while i < len(program):
            instruction = program[i]
            stage, m = instruction.stage, instruction.microbatch
            took, road = kinds[instruction.kind]
            if road is not None:
                arrival = road.arrived[stage * num_microbatches + m]
                if arrival == _NEVER:
                    road.waiting[stage * num_microbatches + m] = device
                    break
                now = max(now, arrival)
            seconds = took[stage]
            now += seconds
            busy[device] += seconds
            last[device] = now
            i += 1
            if road is None or not 0 <= (target := stage + road.step) < num_stages:
                continue
            where = target * num_microbatches + m
            road.arrived[where] = now
            if (there := runs_on[where]) != device:
                now += overhead
                leaves = max(now, link_free.get((device, there), 0))
                road.arrived[where] = link_free[device, there] = leaves + road.seconds[stage]
                if where in road.waiting:
                    ready.append(road.waiting.pop(where))
        at[device], free[device] = i, now
    if any(i < len(program) for i, program in zip(at, schedule.programs, strict=True)):
        raise ScheduleError(f"schedule {schedule.name!r} blocks; validate() shows where")
    return last, busy


def peak_bytes(schedule: Schedule, costs: Sequence[StageCost]) -> tuple[int, ...]:
    """Per device: the highest point of what is kept for the backward pass."""
    return tuple(
        max(accumulate(kept_bytes(program, costs)), default=0) for program in schedule.programs
    )


def held_microbatches(schedule: Schedule) -> tuple[int, ...]:
    """Per stage: how many of its microbatches a device holds when it holds most of all stages'."""
    counts = [0] * schedule.num_stages
    for program in schedule.programs:
        held: dict[int, int] = {}
        most, best = 0, {}
        for i in program:
            held[i.stage] = held.get(i.stage, 0) + KINDS[i.kind].in_flight
            if sum(held.values()) > most:
                most, best = sum(held.values()), dict(held)
        for stage, number in best.items():
            counts[stage] = max(counts[stage], number)
    return tuple(counts)
