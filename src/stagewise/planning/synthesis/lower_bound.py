"""No schedule can be faster than this: a lower bound on the seconds of a step.

Problem: a synthesised schedule is only known to be good beside what is possible at all.
Idea: one device at a time. With its `heads_and_tails` it is a one-machine problem, whose
preemptive optimum (Jackson's rule: of what is released, the longest tail first) bounds every
schedule. Under a cap, bytes times seconds of all microbatches must fit below it, too.
Source: Carlier, "The one-machine sequencing problem", EJOR 1982.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.planning.synthesis.heads_and_tails import HeadsAndTails
from stagewise.planning.synthesis.problem import NEVER, Problem, problem_of


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """Lower bounds on a step's seconds.

    `work_seconds[d]` is device d's work plus the least time before its first and after its last
    instruction; `device_seconds[d]` also knows when its instructions can become ready.
    `path_seconds` is the critical path of one microbatch; `memory_seconds[d]` follows from d's cap.
    """

    work_seconds: tuple[float, ...]
    device_seconds: tuple[float, ...]
    memory_seconds: tuple[float, ...]
    path_seconds: float

    @property
    def busiest_device(self) -> int:
        """The device whose work alone bounds the step most."""
        return max(range(len(self.work_seconds)), key=self.work_seconds.__getitem__)

    @property
    def seconds(self) -> float:
        """The greatest of all."""
        return max(
            *self.work_seconds, *self.device_seconds, *self.memory_seconds, self.path_seconds
        )

    def distance(self, duration_seconds: float) -> float:
        """How far a duration lies above the bound: 0.03 is 3 percent."""
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
    """Bound every schedule of `placement` that keeps the caps; arguments as in `synthesise`.

    Rounding may put it above the optimum by a few units in the last place.
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
    """The bound of a problem that has been laid out already."""
    ranks = HeadsAndTails(problem)
    devices = range(problem.num_devices)
    return LowerBound(
        work_seconds=tuple(_work_seconds(ranks, device) for device in devices),
        device_seconds=tuple(_one_machine_seconds(ranks, device) for device in devices),
        memory_seconds=tuple(_memory_seconds(ranks, device) for device in devices),
        path_seconds=ranks.path_seconds,
    )


def _work_seconds(ranks: HeadsAndTails, device: int) -> float:
    """All work of `device`, and what must come before its first and after its last."""
    stages = ranks.problem.stages_of[device]
    if not stages:
        return 0
    work = sum(
        ranks.count(s, device) * (ranks.forward[s] + ranks.inputs[s] + ranks.weights[s])
        + ranks.recomputing(s, device) * ranks.again[s]
        for s in stages
    )
    before = min(ranks.f_ready[s][1] for s in stages)
    if any(ranks.weights[s] for s in stages):
        return before + work
    return before + work + min(ranks.after(s) for s in stages)


def _one_machine_seconds(ranks: HeadsAndTails, device: int) -> float:
    """The preemptive optimum of `device` alone, with heads and tails."""
    tasks = []  # (ready, seconds, tail)
    for s in ranks.problem.stages_of[device]:
        count = ranks.count(s, device)
        slots, waiting = ranks.slots(s, device), ranks.deferrals(s, device)
        for i in range(1, count + 1):
            left = count - i + 1
            ready = ranks.f_ready[s][i]
            if i > slots:
                ready = max(ready, ranks.i_done[s][i - slots] - ranks.up_overhead[s])
            tasks.append((ready, ranks.forward[s], ranks.f_left[s][left] - ranks.forward[s]))
            tail = ranks.i_left[s][left] - ranks.inputs[s]
            tasks.append((ranks.i_ready[s][i], ranks.inputs[s], tail))
            tail = ranks.i_left[s][left - waiting - 1] if left > waiting + 1 else 0
            tasks.append((ranks.i_done[s][i], ranks.weights[s], tail))
        for i in range(1, (again := ranks.recomputing(s, device)) + 1):
            tasks.append((ranks.f_done[s][i], ranks.again[s], ranks.i_left[s][again - i + 1]))
    return jackson([task for task in tasks if task[1]])


def _memory_seconds(ranks: HeadsAndTails, device: int) -> float:
    """Room times seconds that all microbatches need, under the device's cap.

    Room is counted in bytes, and in weighted microbatches per stage, of which only whole
    numbers fit.
    """
    p, stages = ranks.problem, ranks.problem.stages_of[device]
    if p.caps[device] == NEVER or p.caps[device] <= 0 or not stages:
        return 0
    stays = []
    area: float = 0
    for s in stages:
        cost, whole = p.costs[s], ranks.wholes[s]
        waits = cost.forward_seconds + ranks.trips[s]
        stays.append(waits + ranks.inputs[s] - ranks.up_overhead[s])
        rest = whole * cost.backward_seconds
        if p.split:
            later = p.least_deferred_bytes(s) * cost.weight_seconds
            rest = min(rest, whole * cost.input_seconds + later)
        area += ranks.count(s, device) * (ranks.keeps[s] * waits + rest)
    most = area / p.caps[device]
    alike = ranks.alike[stages[0]] == stages
    keeps = [ranks.keeps[s] for s in stages]
    # The next of what is held to go backward has its whole graph then.
    room = p.caps[device] - min(ranks.wholes[s] - ranks.keeps[s] for s in stages)
    for weights in product((0, 1, 2), repeat=len(stages)) if alike and len(stages) <= 3 else ():
        if held := _most_value(room, keeps, weights):
            each = sum(w * stay for w, stay in zip(weights, stays, strict=True))
            most = max(most, ranks.count(stages[0], device) * each / held)
    before = min(ranks.f_ready[s][1] for s in stages)
    after = 0 if p.split else min(ranks.after(s) for s in stages)
    return before + most + after


def _most_value(cap: float, keeps: Sequence[int], weights: Sequence[int]) -> int:
    """The most that microbatches within `cap` weigh together; 0 where there is no limit.

    One that has come to the k-th stage keeps, and counts, what the first k do.
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
    """Least largest completion + tail of preemptible (ready, seconds, tail) on one machine."""
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
