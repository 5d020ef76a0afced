"""What a set of programs takes and keeps, as `simulate` and `Timeline` say it, but fast.

The additions are those of the simulator, in its order, so that the seconds are equal, not close.
"""

from dataclasses import dataclass

from stagewise.planning.problem import NEVER, B, F, I, Problem, Programs


@dataclass(frozen=True, kw_only=True)
class Replay:
    """When every operation of some programs runs; `starts[op]` and `ends[op]` in seconds.

    A recomputation runs within its backward's start and end.
    """

    starts: list[float]
    ends: list[float]
    arrivals: list[float]
    duration_seconds: float


def duration(problem: Problem, programs: Programs, *, record: bool = False) -> float | Replay:
    """Seconds until the last operation ends; infinite where the programs block each other.

    With `record`, all times.
    """
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
    num_arrivals = 2 * problem.num_stages * problem.num_microbatches
    arrivals: list[float] = [NEVER] * num_arrivals
    starts: list[float] = [NEVER] * (2 * num_arrivals) if record else []
    ends: list[float] = [NEVER] * (2 * num_arrivals) if record else []
    waiting: dict[int, int] = {}
    link_free: list[float] = [0] * problem.num_links
    free: list[float] = [0] * problem.num_devices
    last: list[float] = [0] * problem.num_devices
    at = [0] * problem.num_devices
    ready = list(range(problem.num_devices))
    recomputing = problem.recompute != "never"
    while ready:
        device = ready.pop()
        program, i, t, end = programs[device], at[device], free[device], last[device]
        size = len(program)
        while i < size:
            op = program[i]
            need = needs[op]
            start = t
            if need >= 0:
                arrival = arrivals[need]
                if arrival == NEVER:
                    waiting[need] = device
                    break
                if recomputing and again[op] and not (i and problem.fresh(program[i - 1], op)):
                    t += again[op]
                if arrival > t:
                    if start == t:
                        start = arrival
                    t = arrival
            elif recomputing and again[op] and not (i and problem.fresh(program[i - 1], op)):
                t += again[op]
            end = t = t + seconds[op]
            if record:
                starts[op], ends[op] = start, end
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
            i += 1
        at[device], free[device], last[device] = i, t, end
    blocked = any(i < len(program) for i, program in zip(at, programs, strict=True))
    seconds_all = NEVER if blocked else max(last)
    if not record:
        return seconds_all
    return Replay(starts=starts, ends=ends, arrivals=arrivals, duration_seconds=seconds_all)


def peak_bytes(problem: Problem, device: int, program: list[int]) -> int:
    """The highest point of what `device` keeps for the backward pass, as `Timeline` counts it."""
    costs = problem.costs
    level = peak = 0
    graph: dict[tuple[int, int], int] = {}  # what its backward has to rebuild
    previous = -1
    for i, op in enumerate(program):
        kind, stage, m = problem.parts(op)
        cost = costs[stage]
        if kind == F:
            stored = problem.recomputes[m] and not (
                i + 1 < len(program)
                and problem.parts(program[i + 1])[0] in (B, I)
                and problem.fresh(op, program[i + 1])
            )
            graph[stage, m] = cost.activation_bytes if stored else 0
            level += cost.input_bytes + cost.activation_bytes - graph[stage, m]
        elif kind in (B, I):
            peak = max(peak, level + graph[stage, m])
            level += graph[stage, m] - cost.input_bytes - cost.activation_bytes
            level += cost.deferred_bytes if kind == I else 0
        else:
            level -= cost.deferred_bytes
        peak = max(peak, level)
        previous = op
    return peak


def fits(problem: Problem, programs: Programs) -> bool:
    """Does every device stay within its cap?"""
    return all(
        cap == NEVER or peak_bytes(problem, device, program) <= cap
        for device, (cap, program) in enumerate(zip(problem.caps, programs, strict=True))
    )
