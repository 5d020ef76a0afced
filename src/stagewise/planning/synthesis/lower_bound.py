"""A lower bound on the makespan of a step, whatever the schedule.

Problem: how good a synthesised schedule is can only be judged against what is possible.
Idea: relax to one device at a time. With its `heads_and_tails` it is a one-machine problem, whose
preemptive optimum (Jackson's rule: of the released tasks, the longest tail first) bounds every
schedule. Under a memory cap, the bytes times seconds of all microbatches must also fit below it.
Source: Carlier, "The one-machine sequencing problem", EJOR 1982.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.planning.synthesis.heads_and_tails import HeadsAndTails
from stagewise.planning.synthesis.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
)
from stagewise.planning.synthesis.problem import NEVER, Problem, problem_of


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """Lower bounds on a step's seconds.

    `work_seconds[d]` is device d's work plus the least time before its first and after its last
    instruction; `device_seconds[d]` also considers when each instruction can start.
    `path_seconds` is the critical path of one microbatch; `memory_seconds[d]` follows from d's cap.
    """

    work_seconds: tuple[float, ...]
    device_seconds: tuple[float, ...]
    memory_seconds: tuple[float, ...]
    path_seconds: float

    @property
    def seconds(self) -> float:
        """The largest of the bounds."""
        return max(
            *self.work_seconds, *self.device_seconds, *self.memory_seconds, self.path_seconds
        )

    def distance(self, duration_seconds: float) -> float:
        """Return a duration's relative distance to the bound: 0.03 is 3 percent."""
        return duration_seconds / self.seconds - 1 if self.seconds else 0.0


def lower_bound_seconds(
    placement: Sequence[Sequence[int]],
    costs: Sequence[StageCost],
    num_microbatches: int,
    link: LinkCost = FREE_LINK,
    *,
    memory_bytes: int | Sequence[int] | None = None,
    recompute: str = "never",
    split: bool = True,
) -> LowerBound:
    """Bound every schedule of `placement` that fits the caps; arguments as in `synthesise`.

    Rounding can put the bound above the optimum by a few units in the last place.
    """
    problem = problem_of(
        placement,
        costs,
        num_microbatches,
        link,
        memory_bytes=memory_bytes,
        recompute=recompute,
        split=split,
    )
    return bound_of(problem)


def bound_of(problem: Problem) -> LowerBound:
    """Return the bound of a Problem."""
    bounds = HeadsAndTails(problem)
    devices = range(problem.num_devices)
    return LowerBound(
        work_seconds=tuple(_work_seconds(bounds, device) for device in devices),
        device_seconds=tuple(_one_machine_seconds(bounds, device) for device in devices),
        memory_seconds=tuple(_memory_seconds(bounds, device) for device in devices),
        path_seconds=bounds.path_seconds,
    )


def _work_seconds(bounds: HeadsAndTails, device: int) -> float:
    """Return the work of `device` plus the least time before its first and after its last."""
    stages = bounds.problem.stages_of[device]
    if not stages:
        return 0
    work = sum(
        bounds.count(s, device) * (bounds.forward[s] + bounds.inputs[s] + bounds.weights[s])
        + bounds.recomputing(s, device) * bounds.recompute[s]
        for s in stages
    )
    before = min(bounds.f_ready[s][1] for s in stages)
    if any(bounds.weights[s] for s in stages):
        return before + work
    return before + work + min(bounds.after(s) for s in stages)


def _one_machine_seconds(bounds: HeadsAndTails, device: int) -> float:
    """Return the preemptive optimum of `device` alone, with heads and tails."""
    tasks = []  # (ready, seconds, tail)
    for s in bounds.problem.stages_of[device]:
        count = bounds.count(s, device)
        slots, waiting = bounds.slots(s, device), bounds.deferrals(s, device)
        for i in range(1, count + 1):
            left = count - i + 1
            ready = bounds.f_ready[s][i]
            if i > slots:
                ready = max(ready, bounds.i_done[s][i - slots] - bounds.up_overhead[s])
            tasks.append((ready, bounds.forward[s], bounds.f_left[s][left] - bounds.forward[s]))
            tail = bounds.i_left[s][left] - bounds.inputs[s]
            tasks.append((bounds.i_ready[s][i], bounds.inputs[s], tail))
            tail = bounds.i_left[s][left - waiting - 1] if left > waiting + 1 else 0
            tasks.append((bounds.i_done[s][i], bounds.weights[s], tail))
        for i in range(1, (again := bounds.recomputing(s, device)) + 1):
            tasks.append(
                (bounds.f_done[s][i], bounds.recompute[s], bounds.i_left[s][again - i + 1])
            )
    return jackson([task for task in tasks if task[1]])


def _memory_seconds(bounds: HeadsAndTails, device: int) -> float:
    """Return the bound by memory: the memory-time product of all microbatches over the cap.

    Memory is counted in bytes, and in weighted microbatches per stage, of which only whole numbers
    fit.
    """
    p, stages = bounds.problem, bounds.problem.stages_of[device]
    if p.caps[device] == NEVER or p.caps[device] <= 0 or not stages:
        return 0
    stays = []
    area: float = 0
    for s in stages:
        whole = bounds.with_graph[s]
        waits = p.seconds_of(FORWARD, s) + bounds.round_trips[s]
        stays.append(waits + bounds.inputs[s] - bounds.up_overhead[s])
        rest = whole * p.seconds_of(BACKWARD, s)
        if p.split:
            later = p.least_deferred_bytes(s) * p.seconds_of(BACKWARD_WEIGHT, s)
            rest = min(rest, whole * p.seconds_of(BACKWARD_INPUT, s) + later)
        area += bounds.count(s, device) * (bounds.kept[s] * waits + rest)
    most = area / p.caps[device]
    same = bounds.same_devices[stages[0]] == stages
    keeps = [bounds.kept[s] for s in stages]
    # The next microbatch to run backward has its whole graph.
    room = p.caps[device] - min(bounds.with_graph[s] - bounds.kept[s] for s in stages)
    for weights in product((0, 1, 2), repeat=len(stages)) if same and len(stages) <= 3 else ():
        if held := _most_value(room, keeps, weights):
            each = sum(w * stay for w, stay in zip(weights, stays, strict=True))
            most = max(most, bounds.count(stages[0], device) * each / held)
    before = min(bounds.f_ready[s][1] for s in stages)
    after = 0 if p.split else min(bounds.after(s) for s in stages)
    return before + most + after


def _most_value(cap: float, keeps: Sequence[int], weights: Sequence[int]) -> int:
    """Return the largest total weight of microbatches within `cap`; 0 if unlimited.

    A microbatch that has reached the k-th stage keeps, and weighs, the sum of the first k.
    """
    kinds = list(zip(accumulate(keeps), accumulate(weights), strict=True))

    def most(room: float, at: int) -> int:
        kept, value = kinds[at]
        fit = int(room // kept)
        if at == 0:
            return fit * value
        return max(n * value + most(room - n * kept, at - 1) for n in range(fit + 1))

    least = kinds[0][0]
    if least <= 0 or cap < least or cap // least > 64:
        return 0
    return most(cap, len(kinds) - 1)


def jackson(tasks: Sequence[tuple[float, float, float]]) -> float:
    """Minimise the maximum of completion + tail of preemptible (ready, seconds, tail) tasks."""
    waiting: list[tuple[float, float]] = []  # (-tail, seconds left)
    now: float = 0
    worst: float = 0
    order = sorted(tasks)
    at = 0
    while at < len(order) or waiting:
        if not waiting:
            now = max(now, order[at][0])
        while at < len(order) and order[at][0] <= now:
            heapq.heappush(waiting, (-order[at][2], order[at][1]))
            at += 1
        tail, left = heapq.heappop(waiting)
        until = order[at][0] if at < len(order) else NEVER
        if now + left > until:
            heapq.heappush(waiting, (tail, left - (until - now)))
            now = until
        else:
            now += left
            worst = max(worst, now - tail)
    return worst
