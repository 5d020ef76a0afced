"""No schedule can be faster than this: a lower bound on the seconds of a step.

Problem: a synthesised schedule is only known to be good beside what is possible at all.
Idea: look at one device at a time. The j-th forward that stage s runs cannot start before j
microbatches have come through the stages above; the j-th last cannot be followed by less than
what j microbatches still need below and on the way back. With these heads and tails the device
alone is a one-machine problem, whose preemptive optimum (Jackson's rule: of what is released, the
longest tail first) bounds every schedule. Memory enters twice: a forward starts only when an
earlier microbatch has made room for it, and bytes times seconds of all microbatches fit below the
cap. Source: Carlier, "The one-machine sequencing problem" (EJOR 1982), for heads, tails and rule.

Invariant: a value here is a bound for *some* instruction of a rank in time (the j-th to run), never
for microbatch j, so that no order of microbatches is assumed.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.planning.problem import BACKWARD, FORWARD, NEVER, Problem, problem_of


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
    ranks = Ranks(problem)
    devices = range(problem.num_devices)
    return LowerBound(
        work_seconds=tuple(ranks.work_seconds(device) for device in devices),
        device_seconds=tuple(ranks.one_machine_seconds(device) for device in devices),
        memory_seconds=tuple(ranks.memory_seconds(device) for device in devices),
        path_seconds=ranks.path_seconds,
    )


class Ranks:
    """Heads and tails of the j-th and the j-th last instruction of every stage, j from 1.

    `*_ready[s][j]`: the least time before the j-th starts; `*_done[s][j]`: before its device is
    free again; `*_left[s][j]`: the least time from the start of the j-th last to the end of the
    step. `forward[s]`, `inputs[s]`, `weights[s]` are the least seconds of stage s for F, for the
    backward until its gradient leaves, and for the rest of the backward; a sender's overhead
    counts into the instruction that sends.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = p = problem
        self.stages = range(p.num_stages)
        self.replicas = [len(devices) for devices in p.placement]
        self.alike = [  # stages on the very same devices run a microbatch on the same one
            [t for t in self.stages if p.placement[t] == p.placement[s]] for s in self.stages
        ]
        down = [self._hop(FORWARD, s) for s in self.stages]
        up = [self._hop(BACKWARD, s) for s in self.stages]
        self.down_seconds, self.up_seconds = [d[1] for d in down], [u[1] for u in up]
        self.up_overhead = [u[0] for u in up]
        self.forward = [c.forward_seconds + d[0] for c, d in zip(p.costs, down, strict=True)]
        self.inputs, self.weights = [], []
        for s, c in enumerate(p.costs):
            whole = gradient = c.backward_seconds
            if p.split:
                whole = min(whole, c.input_seconds + c.weight_seconds)
                gradient = min(gradient, c.input_seconds)
            self.inputs.append(gradient + up[s][0])
            self.weights.append(whole - gradient)
        last = p.num_stages - 1
        self.spared = p.recomputes.count(False)  # microbatches that do not recompute
        self.again = [c.recompute_seconds if s != last else 0 for s, c in enumerate(p.costs)]
        self.trips = self._trips()
        self._heads()
        self._tails()

    def _hop(self, kind: int, stage: int) -> tuple[float, float]:
        """Least overhead and transfer seconds of the messages that `kind` on `stage` sends."""
        p = self.problem
        ops = range(p.op(kind, stage, 0), p.op(kind, stage, 0) + p.num_microbatches)
        if any(p.link_of[op] < 0 for op in ops):
            return 0, 0
        return p.link.overhead_seconds, p.transfer_seconds[ops[0]]

    def _trips(self) -> list[float]:
        """Per stage: least seconds between the end of F and the start of its backward."""
        trips: list[float] = [0] * self.problem.num_stages
        for s in reversed(self.stages[:-1]):
            there = self.forward[s] - self.problem.costs[s].forward_seconds + self.down_seconds[s]
            below = self.forward[s + 1] - self._overhead(s + 1) + trips[s + 1]
            trips[s] = there + below + self.inputs[s + 1] + self.up_seconds[s + 1]
        return trips

    def _overhead(self, stage: int) -> float:
        return self.forward[stage] - self.problem.costs[stage].forward_seconds

    def _slots(self, stage: int, device: int) -> int:
        """Bounds how many microbatches `device` can hold between F and backward of `stage`.

        Each also keeps what the stages before left on the device, and the next of them to go
        backward has its whole graph then.
        """
        p, before = self.problem, [t for t in self.alike[stage] if t <= stage]
        again = any(p.recomputes)
        kept = sum(p.costs[t].input_bytes if again else p.whole_bytes(t) for t in before)
        more = p.costs[stage].activation_bytes if again else 0
        if kept == 0 or p.caps[device] == NEVER:
            return p.num_microbatches
        return max(1, int((p.caps[device] - more) // kept))

    def _deferrals(self, stage: int, device: int) -> int:
        """Bounds how many W of `stage` can wait on `device` when a backward of it starts."""
        p, kept = self.problem, self.problem.costs[stage].deferred_bytes
        if kept == 0 or p.caps[device] == NEVER:
            return p.num_microbatches
        return max(0, int((p.caps[device] - p.whole_bytes(stage)) // kept))

    def _heads(self) -> None:
        p, count = self.problem, self.problem.num_microbatches
        zero: float = 0
        self.f_ready = [[zero] * (count + 1) for _ in self.stages]
        self.f_done = [[zero] * (count + 1) for _ in self.stages]
        self.i_ready = [[zero] * (count + 1) for _ in self.stages]
        self.i_done = [[zero] * (count + 1) for _ in self.stages]
        slots = [sum(self._slots(s, d) for d in p.placement[s]) for s in self.stages]
        f_work = [sum(self.forward[t] for t in self.alike[s] if t <= s) for s in self.stages]
        i_work = [
            sum(self.forward[t] for t in self.alike[s])
            + sum(self.inputs[t] for t in self.alike[s] if t >= s)
            for s in self.stages
        ]
        r_work = [sum(self.again[t] for t in self.alike[s] if t >= s) for s in self.stages]
        for j in range(1, count + 1):
            for s in self.stages:
                r = self.replicas[s]
                ready = self.f_done[s - 1][j] + self.down_seconds[s - 1] if s else 0
                if j > slots[s]:
                    ready = max(ready, self.i_done[s][j - slots[s]] - self.up_overhead[s])
                self.f_ready[s][j] = ready
                before = self.f_done[s][j - r] if j > r else 0
                first = self.f_ready[self.alike[s][0]][1]
                self.f_done[s][j] = max(
                    max(ready, before) + self.forward[s], first + -(-j // r) * f_work[s]
                )
            for s in reversed(self.stages):
                r = self.replicas[s]
                ready = self.f_done[s][j] + (0 if self.spared else self.again[s])
                if s + 1 < p.num_stages:
                    ready = max(ready, self.i_done[s + 1][j] + self.up_seconds[s + 1])
                self.i_ready[s][j] = ready
                before = self.i_done[s][j - r] if j > r else 0
                first = self.f_ready[self.alike[s][0]][1]
                own = -(-j // r)
                work = own * i_work[s] + max(0, own - self.spared) * r_work[s]
                self.i_done[s][j] = max(max(ready, before) + self.inputs[s], first + work)

    def _tails(self) -> None:
        p, count = self.problem, self.problem.num_microbatches
        zero: float = 0
        self.f_left = [[zero] * (count + 1) for _ in self.stages]
        self.i_left = [[zero] * (count + 1) for _ in self.stages]
        slots = [sum(self._slots(s, d) for d in p.placement[s]) for s in self.stages]
        rest = [self.inputs[s] + self.weights[s] for s in self.stages]
        i_work = [sum(rest[t] for t in self.alike[s] if t <= s) for s in self.stages]
        f_work = [
            sum(rest[t] for t in self.alike[s])
            + sum(self.forward[t] for t in self.alike[s] if t >= s)
            for s in self.stages
        ]
        r_work = [sum(self.again[t] for t in self.alike[s]) for s in self.stages]
        for j in range(1, count + 1):
            for s in self.stages:
                r = self.replicas[s]
                left = max(self.weights[s], self.i_left[s][j - r] if j > r else 0)
                if s:
                    left = max(left, self.up_seconds[s] + self.i_left[s - 1][j])
                if j > slots[s]:
                    left = max(left, self.f_left[s][j - slots[s]] - self.up_overhead[s])
                self.i_left[s][j] = max(
                    self.inputs[s] + left, -(-j // r) * i_work[s] + self._out(self.alike[s][0])
                )
            for s in reversed(self.stages):
                r = self.replicas[s]
                left = self.i_left[s][j] + (0 if self.spared else self.again[s])
                if j > r:
                    left = max(left, self.f_left[s][j - r])
                if s + 1 < p.num_stages:
                    left = max(left, self.down_seconds[s] + self.f_left[s + 1][j])
                own = -(-j // r)
                work = own * f_work[s] + max(0, own - self.spared) * r_work[s]
                self.f_left[s][j] = max(self.forward[s] + left, work + self._out(self.alike[s][0]))

    def _out(self, first: int) -> float:
        """Least seconds after the last instruction on the devices whose first stage is `first`.

        A W may be the last; without any it is the backward of one of the stages.
        """
        if first == 0 or any(self.weights[t] for t in self.alike[first]):
            return 0
        return self.up_seconds[first] + self.i_left[first - 1][1]

    @property
    def path_seconds(self) -> float:
        """The critical path of a microbatch that has all devices for itself."""
        return self.f_left[0][1]

    def work_seconds(self, device: int) -> float:
        """All work of `device`, and what must come before its first and after its last."""
        stages = self.problem.stages_of[device]
        if not stages:
            return 0
        work = sum(
            self._count(s, device) * (self.forward[s] + self.inputs[s] + self.weights[s])
            + self._recomputing(s, device) * self.again[s]
            for s in stages
        )
        before = min(self.f_ready[s][1] for s in stages)
        if any(self.weights[s] for s in stages):
            return before + work
        return before + work + min(self._after(s) for s in stages)

    def _after(self, stage: int) -> float:
        """Least seconds after a backward of `stage` has gone up."""
        return self.up_seconds[stage] + self.i_left[stage - 1][1] if stage else 0

    def _count(self, stage: int, device: int) -> int:
        """How many microbatches `device` runs on `stage`."""
        return self.problem.device_of[stage].count(device)

    def _recomputing(self, stage: int, device: int) -> int:
        """How many of them recompute."""
        p = self.problem
        owners = zip(p.device_of[stage], p.recomputes, strict=True)
        return sum(again and owner == device for owner, again in owners)

    def one_machine_seconds(self, device: int) -> float:
        """The preemptive optimum of `device` alone, with heads and tails."""
        tasks = []  # (ready, seconds, tail)
        for s in self.problem.stages_of[device]:
            count = self._count(s, device)
            slots, waiting = self._slots(s, device), self._deferrals(s, device)
            for i in range(1, count + 1):
                left = count - i + 1
                ready = self.f_ready[s][i]
                if i > slots:
                    ready = max(ready, self.i_done[s][i - slots] - self.up_overhead[s])
                tasks.append((ready, self.forward[s], self.f_left[s][left] - self.forward[s]))
                tail = self.i_left[s][left] - self.inputs[s]
                tasks.append((self.i_ready[s][i], self.inputs[s], tail))
                tail = self.i_left[s][left - waiting - 1] if left > waiting + 1 else 0
                tasks.append((self.i_done[s][i], self.weights[s], tail))
            for i in range(1, (again := self._recomputing(s, device)) + 1):
                tasks.append((self.f_done[s][i], self.again[s], self.i_left[s][again - i + 1]))
        return jackson([task for task in tasks if task[1]])

    def memory_seconds(self, device: int) -> float:
        """Room times seconds that all microbatches need, under the device's cap.

        Room is counted in bytes, and in weighted microbatches per stage, of which only whole
        numbers fit.
        """
        p, stages = self.problem, self.problem.stages_of[device]
        if p.caps[device] == NEVER or p.caps[device] <= 0 or not stages:
            return 0
        keeps, stays = [], []
        area: float = 0
        for s in stages:
            cost, whole = p.costs[s], p.whole_bytes(s)
            keeps.append(cost.input_bytes if any(p.recomputes) else whole)
            waits = cost.forward_seconds + self.trips[s]
            gradient = self.inputs[s] - self.up_overhead[s]
            stays.append(waits + gradient)
            rest = whole * cost.backward_seconds
            if p.split:
                later = cost.deferred_bytes * cost.weight_seconds
                rest = min(rest, whole * cost.input_seconds + later)
            area += self._count(s, device) * (keeps[-1] * waits + rest)
        most = area / p.caps[device]
        alike = self.alike[stages[0]] == stages
        room = p.caps[device]  # the next of what is held to go backward has its graph then
        if any(p.recomputes):
            room -= min(p.costs[s].activation_bytes for s in stages)
        for weights in product((0, 1, 2), repeat=len(stages)) if alike and len(stages) <= 3 else ():
            if held := _most_value(room, keeps, weights):
                each = sum(w * stay for w, stay in zip(weights, stays, strict=True))
                most = max(most, self._count(stages[0], device) * each / held)
        before = min(self.f_ready[s][1] for s in stages)
        after = 0 if p.split else min(self._after(s) for s in stages)
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

    if kinds[0][0] <= 0 or cap // kinds[0][0] > 64:
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
