"""Local search: a schedule gets faster only if something on its critical path moves.

Idea: between two instructions that follow each other at once on a device and both lie on the
critical path, the later may go first; a W may step out of the way; a backward may be split or
made whole. Late acceptance (Burke & Bykov, EJOR 2017) takes what is no worse than a while ago.
Source: the neighbourhood is that of job-shop scheduling (Nowicki & Smutnicki, Management Science
1996): other swaps of neighbours cannot shorten the critical path.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from stagewise.planning.synthesis.problem import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    NEVER,
    Problem,
    Programs,
)
from stagewise.planning.synthesis.replay import Replay, duration, peak_of, replay

HISTORY = 12  # of late acceptance: so many values back


@dataclass(frozen=True, kw_only=True)
class Found:
    """Programs and their seconds."""

    seconds: float
    programs: Programs


def improve(problem: Problem, found: Found, *, replays: int, enough: float, seed: int = 0) -> Found:
    """The best of `replays` neighbours, one after the other; stops early at `enough` seconds.

    Deterministic in its arguments.
    """
    dice = random.Random(seed)
    best, now = found, found
    history = [found.seconds] * HISTORY
    tried = 0
    while tried < replays and best.seconds > enough:
        moves = list(_moves(problem, now.programs, replay(problem, now.programs)))
        dice.shuffle(moves)
        tried += 2  # a replay that records takes about twice as long
        others = []
        for device, program in moves:
            cap = problem.caps[device]
            if cap < NEVER and peak_of(problem, program) > cap:
                continue
            tried += 1
            programs = [*now.programs]
            programs[device] = program
            other = Found(seconds=duration(problem, programs), programs=programs)
            late = history[tried % HISTORY]
            history[tried % HISTORY] = min(late, now.seconds)
            if other.seconds <= max(now.seconds, late):
                now = other
                break
            if other.seconds < NEVER:
                others.append(other)
            if tried >= replays:
                break
        else:  # a local optimum: leave it by any move
            if not others:
                return best
            now = others[0]
        best = min(best, now, key=lambda f: f.seconds)
    return best


def _moves(problem: Problem, programs: Programs, times: Replay) -> Iterator[tuple[int, list[int]]]:
    """Devices and the programs that they could have instead."""
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
                yield device, _whole(problem, program, stage, m)


def made_whole(problem: Problem, found: Found, *, replays: int, limit: float) -> Found:
    """`found` with whole backwards where that takes no more than `limit` seconds.

    A whole one is one instruction less and keeps nothing for its second half. Looks at so many
    neighbours at most.
    """
    best = found
    for device in range(problem.num_devices):
        for op in found.programs[device]:
            kind, stage, m = problem.parts(op)
            if kind != BACKWARD_INPUT:
                continue
            if not replays:
                return best
            replays -= 1
            programs = [*best.programs]
            programs[device] = _whole(problem, programs[device], stage, m)
            seconds = duration(problem, programs)
            if seconds <= limit:
                best = Found(seconds=seconds, programs=programs)
    return best


def _whole(problem: Problem, program: list[int], stage: int, m: int) -> list[int]:
    """`program` with one backward in place of its halves, where the first of them was."""
    half, weight = (problem.op(k, stage, m) for k in (BACKWARD_INPUT, BACKWARD_WEIGHT))
    whole = problem.op(BACKWARD, stage, m)
    return [whole if op == half else op for op in program if op != weight]


def critical_blocks(
    problem: Problem, programs: Programs, times: Replay
) -> Iterator[tuple[int, int, int]]:
    """One critical path from its end: devices and the first and last positions of their runs."""
    place = {op: (d, at) for d, program in enumerate(programs) for at, op in enumerate(program)}
    device, at = max(
        ((d, len(program) - 1) for d, program in enumerate(programs) if program),
        key=lambda where: times.ends[programs[where[0]][where[1]]],
    )
    makers = times.makers
    last = at
    while True:
        op = programs[device][at]
        need = problem.needs[op]
        # The device stood still for the message: the path goes on where that was made.
        if need >= 0 and times.arrivals[need] >= times.frees[op]:
            yield device, at, last
            device, at = place[makers[need]]
            last = at
        elif at:
            at -= 1
        else:
            yield device, at, last
            return


def _swaps(problem: Problem, one: int, other: int) -> bool:
    """Is it another schedule if `other` goes before `one`, which stands right before it?"""
    kind, stage, m = problem.parts(one)
    other_kind, other_stage, other_m = problem.parts(other)
    if m == other_m and stage == other_stage:
        return False
    return kind != other_kind or stage != other_stage or problem.cycle > 1


def _moved(program: list[int], source: int, target: int) -> list[int]:
    """`program` with what stands at `source` at `target`."""
    rest = [*program[:source], *program[source + 1 :]]
    return [*rest[:target], program[source], *rest[target:]]
