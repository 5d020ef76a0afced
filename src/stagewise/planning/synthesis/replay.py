"""A fast simulator for synthesis: the makespan and peak memory of a set of programs.

It makes the same additions as `simulate` in the same order, so the seconds are exactly equal.
"""

from dataclasses import dataclass
from itertools import accumulate

from stagewise.planning.synthesis.problem import (
    NEVER,
    Problem,
    Programs,
)
from stagewise.timeline import kept_bytes


@dataclass(frozen=True, kw_only=True)
class Replay:
    """When the operations of some programs run, in seconds.

    Per operation: when its device was free for it (`frees`, after recomputation) and its end. Per
    arrival: its time, and the operation that sent it.
    """

    frees: list[float]
    ends: list[float]
    arrivals: list[float]
    senders: list[int]


def duration(problem: Problem, programs: Programs) -> float:
    """Return the seconds until the last operation ends; infinite if the programs deadlock."""
    return _replay(problem, programs, None)


def replay(problem: Problem, programs: Programs) -> Replay:
    """Return all times of programs that do not deadlock."""
    size = 2 * problem.num_stages * problem.num_microbatches
    times = Replay(
        frees=[NEVER] * (2 * size), ends=[NEVER] * (2 * size), arrivals=[], senders=[-1] * size
    )
    _replay(problem, programs, times)
    return times


def _replay(problem: Problem, programs: Programs, times: Replay | None) -> float:
    p, overhead = problem, problem.link.overhead_seconds
    seconds, again, transfers = p.seconds, p.recompute_seconds, p.transfer_seconds
    needs, fills, reaches, link_of = p.needs, p.fills, p.reaches, p.link_of
    recomputing, follows_forward = any(problem.recomputes), problem.follows_forward
    arrivals: list[float] = [NEVER] * (2 * problem.num_stages * problem.num_microbatches)
    waiting: dict[int, int] = {}
    link_free: list[float] = [0] * problem.num_links
    free: list[float] = [0] * problem.num_devices
    last: list[float] = [0] * problem.num_devices
    at, ready = [0] * problem.num_devices, list(range(problem.num_devices))
    while ready:
        device = ready.pop()
        program, i, t, end = programs[device], at[device], free[device], last[device]
        size = len(program)
        while i < size:
            op = program[i]
            need = needs[op]
            if (arrival := arrivals[need] if need >= 0 else 0) == NEVER:
                waiting[need] = device
                break
            if recomputing and again[op] and not (i and follows_forward(program[i - 1], op)):
                t += again[op]
            if times is not None:
                times.frees[op] = t
            if arrival > t:
                t = arrival
            end = t = t + seconds[op]
            if times is not None:
                times.ends[op] = t
            fill = fills[op]
            if fill >= 0:
                link = link_of[op]
                if link < 0:
                    arrivals[fill] = t
                else:
                    t += overhead
                    leaves = link_free[link] if link_free[link] > t else t
                    arrivals[fill] = link_free[link] = leaves + transfers[op]
                    if fill in waiting:
                        del waiting[fill]
                        ready.append(reaches[op])
                if times is not None:
                    times.senders[fill] = op
            i += 1
        at[device], free[device], last[device] = i, t, end
    if times is not None:
        times.arrivals[:] = arrivals
    blocked = any(i < len(program) for i, program in zip(at, programs, strict=True))
    return NEVER if blocked else max(last)


def peak_of(problem: Problem, program: list[int]) -> int:
    """Return the peak of what a device keeps for the backward pass, as `Timeline` counts it."""
    kept = kept_bytes(problem.instructions(program), problem.costs, problem.changes)
    return max(accumulate(kept), default=0)


def fits(problem: Problem, programs: Programs) -> bool:
    """Return whether every device stays within its cap."""
    return all(
        cap == NEVER or peak_of(problem, program) <= cap
        for cap, program in zip(problem.caps, programs, strict=True)
    )
