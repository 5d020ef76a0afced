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
        frees=[NEVER] * (2 * size),
        ends=[NEVER] * (2 * size),
        arrivals=[NEVER] * size,
        senders=[-1] * size,
    )
    _replay(problem, programs, times)
    return times


class _Far:
    """Messages past other stages, each sent before the arrival it belongs to is filled."""

    def __init__(self, problem: Problem) -> None:
        self._sent, self._overhead = problem.far, problem.link.overhead_seconds
        self._arrived: dict[int, float] = {}  # the last of each arrival's
        self._senders: dict[int, int] = {}

    def send(self, op: int, now: float, link_free: list[float]) -> float:
        """Send what `op` sends past others; return when its device is free."""
        for goal, link, seconds in self._sent.get(op, ()):
            now += self._overhead
            link_free[link] = max(link_free[link], now) + seconds
            if self._arrived.get(goal, -1) < link_free[link]:
                self._arrived[goal], self._senders[goal] = link_free[link], op
        return now

    def complete(self, arrivals: list[float], fill: int) -> None:
        """Let an arrival that has been filled wait for what was sent past others."""
        if self._arrived.get(fill, -1) > arrivals[fill]:
            arrivals[fill] = self._arrived[fill]
        else:
            self._senders.pop(fill, None)

    def sender_of(self, fill: int, op: int) -> int:
        """Return who completed an arrival that `op` filled."""
        return self._senders.get(fill, op)


def _replay(problem: Problem, programs: Programs, times: Replay | None) -> float:
    p, overhead = problem, problem.link.overhead_seconds
    seconds, again, transfers = p.seconds, p.recompute_seconds, p.transfer_seconds
    needs, fills, reaches, link_of = p.needs, p.fills, p.reaches, p.link_of
    has_far, far, waiting = bool(p.far), _Far(p), dict[int, int]()
    recomputing, own_forward = any(p.recomputes), p.own_forward
    size = 2 * problem.num_stages * problem.num_microbatches
    arrivals = [NEVER] * size if times is None else times.arrivals
    link_free: list[float] = [0] * problem.num_links
    free, last = (list[float]([0] * problem.num_devices) for _ in range(2))
    at, ready = [0] * problem.num_devices, list(range(problem.num_devices))
    while ready:
        device = ready.pop()
        program, t, end = programs[device], free[device], last[device]
        for i in range(at[device], len(program)):
            op = program[i]
            need = needs[op]
            if (arrival := arrivals[need] if need >= 0 else 0) == NEVER:
                waiting[need], at[device] = device, i
                break
            if recomputing and again[op] and not (i and program[i - 1] == own_forward[op]):
                t += again[op]
            freed = t
            if arrival > t:
                t = arrival
            end = t = t + seconds[op]
            if times is not None:
                times.frees[op], times.ends[op] = freed, end
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
                if has_far:
                    far.complete(arrivals, fill)
                    t = far.send(op, t, link_free)
                if times is not None:
                    times.senders[fill] = far.sender_of(fill, op)
        else:
            at[device] = len(program)
        free[device], last[device] = t, end
    return NEVER if any(map(int.__lt__, at, map(len, programs))) else max(last)


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
