"""How long a schedule takes and what it keeps, without the Timeline: what a search can afford.

The additions are those of `simulate` and `Timeline.activation_bytes`, in their order, so the
numbers are equal, not close. One pass over the programs, arrivals in flat lists, no objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.errors import ScheduleError
from stagewise.planning.simulate import instruction_seconds
from stagewise.schedule import Instruction, Kind, Schedule

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
    num_stages, num_microbatches = schedule.num_stages, schedule.num_microbatches
    took = {
        kind: [instruction_seconds(Instruction(s, kind, 0), costs) for s in range(num_stages)]
        for kind in Kind
    }
    forth = [link.transfer_seconds(cost.output_bytes) for cost in costs]
    back = [link.transfer_seconds(cost.gradient_bytes) for cost in costs]
    arrived = {
        Kind.FORWARD: [_NEVER] * (num_stages * num_microbatches),
        Kind.BACKWARD: [_NEVER] * (num_stages * num_microbatches),
    }
    activations, gradients = arrived[Kind.FORWARD], arrived[Kind.BACKWARD]
    activations[:num_microbatches] = [0] * num_microbatches
    gradients[-num_microbatches:] = [0] * num_microbatches
    placement, overhead = schedule.placement, link.overhead_seconds
    free: list[float] = [0] * schedule.num_devices
    last: list[float] = [0] * schedule.num_devices
    busy: list[float] = [0] * schedule.num_devices
    at = [0] * schedule.num_devices
    link_free: dict[tuple[int, int], float] = {}
    waiting: dict[tuple[Kind, int], int] = {}
    ready = list(range(schedule.num_devices))
    while ready:
        device = ready.pop()
        program, i, now = schedule.programs[device], at[device], free[device]
        while i < len(program):
            instruction = program[i]
            stage, kind, m = instruction.stage, instruction.kind, instruction.microbatch
            where = stage * num_microbatches + m
            if kind is Kind.FORWARD:
                needs, target = activations[where], stage + 1
            elif kind is Kind.BACKWARD or kind is Kind.BACKWARD_INPUT:
                needs, target = gradients[where], stage - 1
            else:
                needs, target = 0, -1
            if needs == _NEVER:
                blocked_on = Kind.FORWARD if kind is Kind.FORWARD else Kind.BACKWARD
                waiting[blocked_on, where] = device
                break
            seconds = took[kind][stage]
            now = max(now, needs) + seconds
            busy[device] += seconds
            last[device] = now
            i += 1
            if not 0 <= target < num_stages:
                continue
            sent = Kind.FORWARD if target > stage else Kind.BACKWARD
            there = placement[target][m % len(placement[target])]
            arrival = now
            if there != device:
                now += overhead
                leaves = max(now, link_free.get((device, there), 0))
                arrival = leaves + (forth[stage] if target > stage else back[target])
                link_free[device, there] = arrival
            arrived[sent][target * num_microbatches + m] = arrival
            if there != device and (sent, target * num_microbatches + m) in waiting:
                ready.append(waiting.pop((sent, target * num_microbatches + m)))
        at[device], free[device] = i, now
    if any(i < len(program) for i, program in zip(at, schedule.programs, strict=True)):
        raise ScheduleError(f"schedule {schedule.name!r} blocks; validate() shows where")
    return Outcome(
        seconds=max(last),
        end_seconds=tuple(last),
        busy_seconds=tuple(busy),
        peak_bytes=peak_bytes(schedule, costs),
    )


def peak_bytes(schedule: Schedule, costs: Sequence[StageCost]) -> tuple[int, ...]:
    """Per device: the highest point of what is kept for the backward pass."""
    recomputed = schedule.recomputed
    return tuple(
        _peak(schedule, device, costs, recomputed) for device in range(schedule.num_devices)
    )


def _peak(
    schedule: Schedule,
    device: int,
    costs: Sequence[StageCost],
    recomputed: frozenset[tuple[int, int]],
) -> int:
    beside = [
        stage > 0 and device in schedule.placement[stage - 1]
        for stage in range(schedule.num_stages)
    ]
    level = peak = 0
    done: set[tuple[int, int]] = set()  # their activations are gone
    waiting: set[tuple[int, int]] = set()  # for `W`

    def lends(stage: int, m: int) -> bool:
        """Whether the stage before keeps, on this device, what `stage` was given."""
        return (
            beside[stage]
            and (stage - 1, m) not in recomputed
            and schedule.device_of(stage - 1, m) == device
        )

    for i in schedule.programs[device]:
        stage, kind, m = i.stage, i.kind, i.microbatch
        cost, lent = costs[stage], lends(stage, m)
        if kind is Kind.RECOMPUTE:
            level += cost.activation_bytes
        elif kind is Kind.FORWARD:
            level += 0 if lent else cost.input_bytes
            level += 0 if (stage, m) in recomputed else cost.activation_bytes
        elif kind is Kind.BACKWARD_WEIGHT:
            waiting.discard((stage, m))
            level -= cost.deferred_bytes
            level += cost.deferred_input_bytes if lent and (stage - 1, m) not in done else 0
        else:
            done.add((stage, m))
            level -= cost.activation_bytes + (0 if lent else cost.input_bytes)
            if (stage + 1, m) in waiting and lends(stage + 1, m):
                level += costs[stage + 1].deferred_input_bytes
            if kind is Kind.BACKWARD_INPUT:
                waiting.add((stage, m))
                level += cost.deferred_bytes
                level -= cost.deferred_input_bytes if lent and (stage - 1, m) not in done else 0
        peak = max(peak, level)
    return peak


def held_microbatches(schedule: Schedule) -> tuple[int, ...]:
    """Per stage: how many of its microbatches a device holds when it holds most of all stages'."""
    counts = [0] * schedule.num_stages
    for program in schedule.programs:
        held: dict[int, int] = {}
        most, best = 0, {}
        for i in program:
            if i.kind is Kind.FORWARD:
                held[i.stage] = held.get(i.stage, 0) + 1
                if sum(held.values()) > most:
                    most, best = sum(held.values()), dict(held)
            elif i.kind is Kind.BACKWARD or i.kind is Kind.BACKWARD_WEIGHT:
                held[i.stage] -= 1
        for stage, number in best.items():
            counts[stage] = max(counts[stage], number)
    return tuple(counts)
