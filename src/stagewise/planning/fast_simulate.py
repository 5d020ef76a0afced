"""A fast simulator for searches: duration and peak memory of a schedule, without a Timeline.

It makes the same additions as `simulate` and `Timeline.activation_bytes` in the same order, so the
results are exactly equal. One pass over the programs, arrival times in flat lists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.errors import ScheduleError
from stagewise.mesh import device_turns
from stagewise.planning.simulate import checked_shares
from stagewise.schedule import Kind, Schedule
from stagewise.schedule.instruction import ACTIVATIONS, GRADIENTS, KINDS, KindTraits, Stream
from stagewise.schedule.lowering import lowest_target
from stagewise.timeline import changes_by_kind, kept_bytes

_NEVER = float("inf")
Row = TypeVar("Row")
Times = list[list[tuple[float, float]]]  # start and end, by device


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A step's duration, and each device's last end, busy time and peak activations."""

    seconds: float
    end_seconds: tuple[float, ...]
    busy_seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]


def outcome_of(
    schedule: Schedule,
    costs: Sequence[StageCost],
    link: LinkCost = FREE_LINK,
    *,
    shares: Sequence[float] = (),
) -> Outcome:
    """Return what `simulate` and its Timeline would say of duration, busy time and memory."""
    ends, busy = _ends_and_busy(schedule, costs, link, shares)
    return Outcome(
        seconds=max(ends),
        end_seconds=tuple(ends),
        busy_seconds=tuple(busy),
        peak_bytes=peak_bytes(schedule, costs),
    )


def step_seconds(schedule: Schedule, costs: Sequence[StageCost], link: LinkCost) -> float:
    """Return the duration alone."""
    return max(_ends_and_busy(schedule, costs, link, ())[0])


def times_of(schedule: Schedule, costs: Sequence[StageCost], link: LinkCost) -> Times:
    """Return when each of a device's instructions starts and ends, in its program's order."""
    times: Times = [[] for _ in schedule.programs]
    _ends_and_busy(schedule, costs, link, (), times)
    return times


class _StreamState:
    """When a stream's messages arrive, by stage and microbatch, and which devices wait for them."""

    def __init__(
        self,
        stream: Stream,
        schedule: Schedule,
        costs: Sequence[StageCost],
        link: LinkCost,
        shares: Sequence[float],
    ) -> None:
        stages, self.step = range(schedule.num_stages), stream.step
        self.seconds = _by_microbatch(
            schedule,
            shares,
            lambda share: [
                stream.seconds(s, costs, link, 1, share) if s + stream.step in stages else 0
                for s in stages
            ],
        )
        self.arrived: list[float] = [
            _NEVER if stage - stream.step in stages else 0
            for stage in stages
            for _ in range(schedule.num_microbatches)
        ]
        self.waiting: dict[int, int] = {}
        self.targets = range(lowest_target(stream, schedule), schedule.num_stages)
        far = stream.far(costs)
        self.far = _by_microbatch(
            schedule,
            shares,
            lambda share: [
                [(d * stream.step, stream.seconds(s, costs, link, d, share)) for d in distances]
                for s, distances in enumerate(far)
            ],
        )
        self.far_arrived: dict[int, float] = {}
        self._count, self._overhead = schedule.num_microbatches, link.overhead_seconds

    def send_far(
        self,
        sender: tuple[int, int, int],
        now: float,
        runs_on: Sequence[int],
        link_free: dict[tuple[int, int], float],
    ) -> float:
        """Send past the next stage what `sender` (device, stage, microbatch) made.

        Return when its device is free.
        """
        device, stage, m = sender
        for distance, seconds in self.far[m][stage]:
            goal = (stage + distance) * self._count + m
            if stage + distance in self.targets and (there := runs_on[goal]) != device:
                now += self._overhead
                leaves = max(now, link_free.get((device, there), 0))
                link_free[device, there] = arrives = leaves + seconds
                self.far_arrived[goal] = max(arrives, self.far_arrived.get(goal, 0))
        return now


def _by_microbatch(
    schedule: Schedule, shares: Sequence[float], of: Callable[[float], Row]
) -> list[Row]:
    """Return `of` each microbatch's share; without shares, one row is in all places."""
    if not shares:
        return [of(1)] * schedule.num_microbatches
    return [of(share) for share in checked_shares(schedule, shares)]


def _ends_and_busy(
    schedule: Schedule,
    costs: Sequence[StageCost],
    link: LinkCost,
    shares: Sequence[float],
    times: Times | None = None,
) -> tuple[list[float], list[float]]:
    num_microbatches = schedule.num_microbatches
    kinds = _streams_and_seconds(schedule, costs, link, shares)
    overhead, link_free = link.overhead_seconds, dict[tuple[int, int], float]()
    runs_on = [d for devices in schedule.placement for d in device_turns(devices, num_microbatches)]
    free, last, busy = (list[float]([0] * schedule.num_devices) for _ in range(3))
    at, ready = [0] * schedule.num_devices, list(range(schedule.num_devices))
    while ready:
        device = ready.pop()
        program, i, now = schedule.programs[device], at[device], free[device]
        while i < len(program):
            instruction = program[i]
            stage, m = instruction.stage, instruction.microbatch
            took, stream = kinds[instruction.kind]
            if stream is not None:
                own = stage * num_microbatches + m
                if (arrival := stream.arrived[own]) == _NEVER:
                    stream.waiting[own] = device
                    break
                now = max(now, arrival, stream.far_arrived.get(own, 0))
            # A gather's number is no microbatch's.
            seconds = took[m if m < num_microbatches else 0][stage]
            if times is not None:
                times[device].append((now, now + seconds))
            now += seconds
            busy[device] += seconds
            last[device] = now
            i += 1
            if stream is None or (target := stage + stream.step) not in stream.targets:
                continue
            where = target * num_microbatches + m
            stream.arrived[where] = now
            if (there := runs_on[where]) != device:
                now += overhead
                leaves = max(now, link_free.get((device, there), 0))
                stream.arrived[where] = link_free[device, there] = leaves + stream.seconds[m][stage]
            if stream.far[m][stage]:
                now = stream.send_far((device, stage, m), now, runs_on, link_free)
            if where in stream.waiting and runs_on[where] != device:
                ready.append(stream.waiting.pop(where))
        at[device], free[device] = i, now
    if any(i < len(program) for i, program in zip(at, schedule.programs, strict=True)):
        raise ScheduleError(f"schedule {schedule.name!r} deadlocks; validate() shows where")
    return last, busy


def _streams_and_seconds(
    schedule: Schedule, costs: Sequence[StageCost], link: LinkCost, shares: Sequence[float]
) -> dict[Kind, tuple[list[list[float]], _StreamState | None]]:
    """Return what every kind takes, by microbatch and stage, and whose messages it waits for."""

    def of(traits: KindTraits, share: float) -> list[float]:
        return [traits.seconds_on(cost) * share for cost in costs]

    streams: dict[Stream | None, _StreamState] = {
        each: _StreamState(each, schedule, costs, link, shares) for each in (ACTIVATIONS, GRADIENTS)
    }
    return {
        kind: (
            _by_microbatch(schedule, () if traits.of_shards else shares, partial(of, traits)),
            streams.get(traits.stream),
        )
        for kind, traits in KINDS.items()
    }


def peak_bytes(schedule: Schedule, costs: Sequence[StageCost]) -> tuple[int, ...]:
    """Return each device's peak of what is kept for the backward pass."""
    changes = changes_by_kind(costs)
    return tuple(
        max(accumulate(kept_bytes(program, costs, changes)), default=0)
        for program in schedule.programs
    )


def held_microbatches(schedule: Schedule) -> tuple[int, ...]:
    """Return, per stage, how many microbatches a device holds when its total is largest."""
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
