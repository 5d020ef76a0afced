"""Local search: improve a schedule by moves on its critical path.

Idea: swap two adjacent instructions of a device that are both on the critical path, move a W out of
the way, split or merge a backward. Late acceptance (Burke & Bykov, EJOR 2017) takes a neighbour
that is no worse than the solution some iterations ago.
Source: the neighbourhood is that of job-shop scheduling (Nowicki & Smutnicki, Management Science
1996): other swaps of adjacent instructions cannot shorten the critical path.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from stagewise.planning.synthesis.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
)
from stagewise.planning.synthesis.problem import NEVER, Problem, Programs
from stagewise.planning.synthesis.replay import Replay, duration, peak_of, replay

HISTORY = 12  # length of late acceptance


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Programs and their makespan."""

    seconds: float
    programs: Programs


def improve(
    problem: Problem, start: Solution, *, replays: int, enough: float, seed: int = 0
) -> Solution:
    """Return the best of `replays` neighbours visited in turn; stop early at `enough` seconds.

    Deterministic in its arguments.
    """
    rng = random.Random(seed)
    best, now = start, start
    history = [start.seconds] * HISTORY
    tried = 0
    while tried < replays and best.seconds > enough:
        moves = list(_moves(problem, now.programs, replay(problem, now.programs)))
        rng.shuffle(moves)
        tried += 2  # a recorded replay takes about twice as long
        others = []
        for device, program in moves:
            cap = problem.caps[device]
            if cap < NEVER and peak_of(problem, program) > cap:
                continue
            tried += 1
            programs = [*now.programs]
            programs[device] = program
            other = Solution(seconds=duration(problem, programs), programs=programs)
            late = history[tried % HISTORY]
            history[tried % HISTORY] = min(late, now.seconds)
            if other.seconds <= max(now.seconds, late):
                now = other
                break
            if other.seconds < NEVER:
                others.append(other)
            if tried >= replays:
                break
        else:  # a local optimum: leave it by any feasible move
            if not others:
                return best
            now = others[0]
        best = min(best, now, key=lambda solution: solution.seconds)
    return best


def _moves(problem: Problem, programs: Programs, times: Replay) -> Iterator[tuple[int, list[int]]]:
    """Yield neighbours as (device, its new program)."""
    for device, first, last in critical_blocks(problem, programs, times):
        program = programs[device]
        for at in {first, last - 1} if last > first else ():
            if _swaps(problem, program[at], program[at + 1]):
                yield device, [*program[:at], program[at + 1], program[at], *program[at + 2 :]]
        for at in range(first, last + 1):
            kind, stage, m = problem.parts(program[at])
            if kind == BACKWARD_WEIGHT and at < last:
                yield device, _moved(program, at, last)
                yield device, _moved(program, at, len(program) - 1)
            elif at > first + 1 and kind != BACKWARD_WEIGHT:
                own = {problem.op(k, stage, m) for k in (FORWARD, BACKWARD, BACKWARD_INPUT)}
                if own.isdisjoint(program[first:at]):
                    yield device, _moved(program, at, first)
            if not problem.split:
                continue
            if kind == BACKWARD:
                rest = [*program[:at], problem.op(BACKWARD_INPUT, stage, m), *program[at + 1 :]]
                yield (
                    device,
                    [*rest[: last + 1], problem.op(BACKWARD_WEIGHT, stage, m), *rest[last + 1 :]],
                )
            elif kind == BACKWARD_INPUT:
                yield device, _merge(problem, program, stage, m)


def merge_backwards(
    problem: Problem, solution: Solution, *, replays: int, limit: float
) -> Solution:
    """Return `solution` with split backwards merged as far as it stays within `limit` seconds.

    A whole backward is one instruction less and keeps nothing for its second half. At most
    `replays` neighbours are evaluated.
    """
    best = solution
    for device in range(problem.num_devices):
        for op in solution.programs[device]:
            kind, stage, m = problem.parts(op)
            if kind != BACKWARD_INPUT:
                continue
            if not replays:
                return best
            replays -= 1
            programs = [*best.programs]
            programs[device] = _merge(problem, programs[device], stage, m)
            seconds = duration(problem, programs)
            if seconds <= limit:
                best = Solution(seconds=seconds, programs=programs)
    return best


def _merge(problem: Problem, program: list[int], stage: int, m: int) -> list[int]:
    """Return `program` with a whole backward in place of I, and without its W."""
    half, weight = (problem.op(k, stage, m) for k in (BACKWARD_INPUT, BACKWARD_WEIGHT))
    whole = problem.op(BACKWARD, stage, m)
    return [whole if op == half else op for op in program if op != weight]


def critical_blocks(
    problem: Problem, programs: Programs, times: Replay
) -> Iterator[tuple[int, int, int]]:
    """Yield one critical path from its end as (device, first position, last position)."""
    place = {op: (d, at) for d, program in enumerate(programs) for at, op in enumerate(program)}
    device, at = max(
        ((d, len(program) - 1) for d, program in enumerate(programs) if program),
        key=lambda where: times.ends[programs[where[0]][where[1]]],
    )
    senders = times.senders
    last = at
    while True:
        op = programs[device][at]
        need = problem.needs[op]
        # The device waited for the message: the path continues at its sender.
        if need >= 0 and times.arrivals[need] >= times.frees[op]:
            yield device, at, last
            device, at = place[senders[need]]
            last = at
        elif at:
            at -= 1
        else:
            yield device, at, last
            return


def _swaps(problem: Problem, one: int, other: int) -> bool:
    """Return whether swapping `one` with its successor `other` gives a different schedule."""
    kind, stage, m = problem.parts(one)
    other_kind, other_stage, other_m = problem.parts(other)
    if m == other_m and stage == other_stage:
        return False
    return kind != other_kind or stage != other_stage or problem.cycle > 1


def _moved(program: list[int], source: int, target: int) -> list[int]:
    """Return `program` with the operation at `source` moved to `target`."""
    rest = [*program[:source], *program[source + 1 :]]
    return [*rest[:target], program[source], *rest[target:]]
