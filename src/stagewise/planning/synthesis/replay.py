"""What a set of programs takes and keeps, as `simulate` and `Timeline` say it, but fast.

The additions are those of the simulator, in its order, so that the seconds are equal, not close.
"""

from dataclasses import dataclass

from stagewise.planning.synthesis.problem import (
    BACKWARD,
    BACKWARD_INPUT,
    FORWARD,
    NEVER,
    Problem,
    Programs,
)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """When the operations of some programs run, in seconds.

    Per operation: when its device could have begun it (`frees`, a recomputation done) and its
    end. Per arrival: when, and by which operation.
    """

    frees: list[float]
    ends: list[float]
    arrivals: list[float]
    makers: list[int]


def duration(problem: Problem, programs: Programs) -> float:
    """Seconds until the last operation ends; infinite where the programs block each other."""
    return _replay(problem, programs, None)


def replay(problem: Problem, programs: Programs) -> Replay:
    """All times of programs that do not block each other."""
    size = 2 * problem.num_stages * problem.num_microbatches
    times = Replay(
        frees=[NEVER] * (2 * size), ends=[NEVER] * (2 * size), arrivals=[], makers=[-1] * size
    )
    _replay(problem, programs, times)
    return times


def _replay(problem: Problem, programs: Programs, times: Replay | None) -> float:
    seconds, again, transfers = (
        problem.seconds,
        problem.recompute_seconds,
        problem.transfer_seconds,
    )
    needs, fills, reaches, link_of = (
        problem.needs,
        problem.fills,
        problem.reaches,
        problem.link_of,
    )
    overhead = problem.link.overhead_seconds
    recomputing = any(problem.recomputes)
    arrivals: list[float] = [NEVER] * (2 * problem.num_stages * problem.num_microbatches)
    waiting: dict[int, int] = {}
    link_free: list[float] = [0] * problem.num_links
    free: list[float] = [0] * problem.num_devices
    last: list[float] = [0] * problem.num_devices
    at = [0] * problem.num_devices
    ready = list(range(problem.num_devices))
    while ready:
        device = ready.pop()
        program, i, t, end = programs[device], at[device], free[device], last[device]
        size = len(program)
        while i < size:
            op = program[i]
            need = needs[op]
            arrival = arrivals[need] if need >= 0 else 0
            if arrival == NEVER:
                waiting[need] = device
                break
            if recomputing and again[op] and not (i and problem.fresh(program[i - 1], op)):
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
                    times.makers[fill] = op
            i += 1
        at[device], free[device], last[device] = i, t, end
    if times is not None:
        times.arrivals[:] = arrivals
    blocked = any(i < len(program) for i, program in zip(at, programs, strict=True))
    return NEVER if blocked else max(last)


def peak_bytes(problem: Problem, device: int, program: list[int]) -> int:
    """The highest point of what `device` keeps for the backward pass, as `Timeline` counts it."""
    costs = problem.costs
    level = peak = 0
    graph: dict[tuple[int, int], int] = {}  # what its backward has to rebuild
    done: set[tuple[int, int]] = set()  # their activations are gone
    waiting: set[tuple[int, int]] = set()  # for `W`

    def lent(stage: int, m: int) -> int:
        """What waits for `W` and is kept by the stage before in any case."""
        kept = problem.lends(stage, m) and (stage - 1, m) not in done
        return costs[stage].deferred_input_bytes if kept else 0

    for i, op in enumerate(program):
        kind, stage, m = problem.parts(op)
        cost = costs[stage]
        if kind == FORWARD:
            stored = problem.recomputes[m] and not (
                i + 1 < len(program)
                and problem.parts(program[i + 1])[0] in (BACKWARD, BACKWARD_INPUT)
                and problem.fresh(op, program[i + 1])
            )
            graph[stage, m] = cost.activation_bytes if stored else 0
            level += problem.whole_bytes(stage, m) - graph[stage, m]
        elif kind in (BACKWARD, BACKWARD_INPUT):
            peak = max(peak, level + graph[stage, m])
            level += graph[stage, m] - problem.whole_bytes(stage, m)
            done.add((stage, m))
            if (stage + 1, m) in waiting and problem.lends(stage + 1, m):
                level += costs[stage + 1].deferred_input_bytes
            if kind == BACKWARD_INPUT:
                waiting.add((stage, m))
                level += cost.deferred_bytes - lent(stage, m)
        else:
            waiting.discard((stage, m))
            level -= cost.deferred_bytes - lent(stage, m)
        peak = max(peak, level)
    return peak


def fits(problem: Problem, programs: Programs) -> bool:
    """Does every device stay within its cap?"""
    return all(
        cap == NEVER or peak_bytes(problem, device, program) <= cap
        for device, (cap, program) in enumerate(zip(problem.caps, programs, strict=True))
    )
