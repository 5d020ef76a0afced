"""Heads and tails: the least time before and after the j-th instruction of every stage.

Idea: the j-th forward of stage s cannot start before j microbatches have passed through the earlier
stages and, under a memory cap, before an earlier one has freed memory; after the j-th last forward,
j microbatches must still pass through the later stages and back.

Invariant: a value bounds the j-th instruction to run, whichever microbatch that is, so no order of
microbatches is assumed.
"""

from stagewise.planning.synthesis.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
)
from stagewise.planning.synthesis.problem import NEVER, Problem


class HeadsAndTails:
    """Heads of the j-th and tails of the j-th last instruction of every stage, j from 1.

    `*_ready[s][j]`: the least time before the j-th starts; `*_done[s][j]`: before its device is
    free again; `*_left[s][j]`: the least time from the start of the j-th last to the end of the
    step. `forward[s]`, `inputs[s]`, `weights[s]` are the least seconds of stage s for F, for the
    backward until its gradient is sent, and for the rest of the backward; a sender's overhead
    counts towards the instruction that sends. `with_graph[s]` and `kept[s]`: the least bytes that a
    microbatch keeps on stage s while its graph exists, and between F and backward.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = p = problem
        self.stages = range(p.num_stages)
        self.replicas = [len(devices) for devices in p.placement]
        self.same_devices = [  # such stages run a microbatch on the same device
            [t for t in self.stages if p.placement[t] == p.placement[s]] for s in self.stages
        ]
        down = [self._hop(FORWARD, s) for s in self.stages]
        up = [self._hop(BACKWARD, s) for s in self.stages]
        self.down_seconds, self.up_seconds = [d[1] for d in down], [u[1] for u in up]
        self.up_overhead = [u[0] for u in up]
        self.forward = [p.seconds_of(FORWARD, s) + down[s][0] for s in self.stages]
        self.inputs, self.weights = [], []
        for s in self.stages:
            whole = gradient = p.seconds_of(BACKWARD, s)
            if p.split:
                inputs = p.seconds_of(BACKWARD_INPUT, s)
                whole = min(whole, inputs + p.seconds_of(BACKWARD_WEIGHT, s))
                gradient = min(gradient, inputs)
            self.inputs.append(gradient + up[s][0])
            self.weights.append(whole - gradient)
        last = p.num_stages - 1
        self.num_kept = p.recomputes.count(False)  # microbatches that do not recompute
        self.recompute = [p.recompute_seconds_of(s) if s != last else 0 for s in self.stages]
        self.round_trips = self._round_trips()
        microbatches = range(p.num_microbatches)
        self.with_graph = [min(p.whole_bytes(s, m) for m in microbatches) for s in self.stages]
        self.kept = [
            min(
                p.input_bytes(s, m) if p.recomputes[m] else p.whole_bytes(s, m)
                for m in microbatches
            )
            for s in self.stages
        ]
        self._heads()
        self._tails()

    def _hop(self, kind: int, stage: int) -> tuple[float, float]:
        """Return the least overhead and transfer seconds of messages sent by `kind` on `stage`."""
        p = self.problem
        ops = range(p.op(kind, stage, 0), p.op(kind, stage, 0) + p.num_microbatches)
        if any(p.link_of[op] < 0 for op in ops):
            return 0, 0
        return p.link.overhead_seconds, p.transfer_seconds[ops[0]]

    def _round_trips(self) -> list[float]:
        """Return, per stage, the least seconds between the end of F and the start of backward."""
        trips: list[float] = [0] * self.problem.num_stages
        for s in reversed(self.stages[:-1]):
            there = self._down_overhead(s) + self.down_seconds[s]
            below = self.forward[s + 1] - self._down_overhead(s + 1) + trips[s + 1]
            trips[s] = there + below + self.inputs[s + 1] + self.up_seconds[s + 1]
        return trips

    def _down_overhead(self, stage: int) -> float:
        return self.forward[stage] - self.problem.seconds_of(FORWARD, stage)

    def slots(self, stage: int, device: int) -> int:
        """Bound how many microbatches `device` can hold between F and backward of `stage`.

        Each also keeps what earlier stages keep on the device, and the next one to run backward has
        its whole graph.
        """
        cap = self.problem.caps[device]
        kept = sum(self.kept[t] for t in self.same_devices[stage] if t <= stage)
        if kept == 0 or cap == NEVER:
            return self.problem.num_microbatches
        return max(1, int((cap - self.with_graph[stage] + self.kept[stage]) // kept))

    def deferrals(self, stage: int, device: int) -> int:
        """Bound how many W of `stage` can be deferred on `device` when its backward starts."""
        cap, kept = self.problem.caps[device], self.problem.least_deferred_bytes(stage)
        if kept == 0 or cap == NEVER:
            return self.problem.num_microbatches
        return max(0, int((cap - self.with_graph[stage]) // kept))

    def _heads(self) -> None:
        p, count = self.problem, self.problem.num_microbatches
        zero: float = 0
        self.f_ready = [[zero] * (count + 1) for _ in self.stages]
        self.f_done = [[zero] * (count + 1) for _ in self.stages]
        self.i_ready = [[zero] * (count + 1) for _ in self.stages]
        self.i_done = [[zero] * (count + 1) for _ in self.stages]
        slots = [sum(self.slots(s, d) for d in p.placement[s]) for s in self.stages]
        f_work = [sum(self.forward[t] for t in self.same_devices[s] if t <= s) for s in self.stages]
        i_work = [
            sum(self.forward[t] for t in self.same_devices[s])
            + sum(self.inputs[t] for t in self.same_devices[s] if t >= s)
            for s in self.stages
        ]
        r_work = [
            sum(self.recompute[t] for t in self.same_devices[s] if t >= s) for s in self.stages
        ]
        for j in range(1, count + 1):
            for s in self.stages:
                r = self.replicas[s]
                ready = self.f_done[s - 1][j] + self.down_seconds[s - 1] if s else 0
                if j > slots[s]:
                    ready = max(ready, self.i_done[s][j - slots[s]] - self.up_overhead[s])
                self.f_ready[s][j] = ready
                before = self.f_done[s][j - r] if j > r else 0
                first = self.f_ready[self.same_devices[s][0]][1]
                self.f_done[s][j] = max(
                    max(ready, before) + self.forward[s], first + -(-j // r) * f_work[s]
                )
            for s in reversed(self.stages):
                r = self.replicas[s]
                ready = self.f_done[s][j] + (0 if self.num_kept else self.recompute[s])
                if s + 1 < p.num_stages:
                    ready = max(ready, self.i_done[s + 1][j] + self.up_seconds[s + 1])
                self.i_ready[s][j] = ready
                before = self.i_done[s][j - r] if j > r else 0
                first = self.f_ready[self.same_devices[s][0]][1]
                own = -(-j // r)
                work = own * i_work[s] + max(0, own - self.num_kept) * r_work[s]
                self.i_done[s][j] = max(max(ready, before) + self.inputs[s], first + work)

    def _tails(self) -> None:
        p, count = self.problem, self.problem.num_microbatches
        zero: float = 0
        self.f_left = [[zero] * (count + 1) for _ in self.stages]
        self.i_left = [[zero] * (count + 1) for _ in self.stages]
        slots = [sum(self.slots(s, d) for d in p.placement[s]) for s in self.stages]
        rest = [self.inputs[s] + self.weights[s] for s in self.stages]
        i_work = [sum(rest[t] for t in self.same_devices[s] if t <= s) for s in self.stages]
        f_work = [
            sum(rest[t] for t in self.same_devices[s])
            + sum(self.forward[t] for t in self.same_devices[s] if t >= s)
            for s in self.stages
        ]
        r_work = [sum(self.recompute[t] for t in self.same_devices[s]) for s in self.stages]
        for j in range(1, count + 1):
            for s in self.stages:
                r = self.replicas[s]
                left = max(self.weights[s], self.i_left[s][j - r] if j > r else 0)
                if s:
                    left = max(left, self.up_seconds[s] + self.i_left[s - 1][j])
                if j > slots[s]:
                    left = max(left, self.f_left[s][j - slots[s]] - self.up_overhead[s])
                self.i_left[s][j] = max(
                    self.inputs[s] + left,
                    -(-j // r) * i_work[s] + self._after_last(self.same_devices[s][0]),
                )
            for s in reversed(self.stages):
                r = self.replicas[s]
                left = self.i_left[s][j] + (0 if self.num_kept else self.recompute[s])
                if j > r:
                    left = max(left, self.f_left[s][j - r])
                if s + 1 < p.num_stages:
                    left = max(left, self.down_seconds[s] + self.f_left[s + 1][j])
                own = -(-j // r)
                work = own * f_work[s] + max(0, own - self.num_kept) * r_work[s]
                self.f_left[s][j] = max(
                    self.forward[s] + left, work + self._after_last(self.same_devices[s][0])
                )

    def _after_last(self, first: int) -> float:
        """Return the least seconds after the last instruction of devices with first stage `first`.

        The last instruction may be a W; without any, it is the backward of one of the stages.
        """
        if first == 0 or any(self.weights[t] for t in self.same_devices[first]):
            return 0
        return self.up_seconds[first] + self.i_left[first - 1][1]

    @property
    def path_seconds(self) -> float:
        """The critical path of a microbatch that has all devices to itself."""
        return self.f_left[0][1]

    def after(self, stage: int) -> float:
        """Return the least seconds after a backward of `stage` has sent its gradient."""
        return self.up_seconds[stage] + self.i_left[stage - 1][1] if stage else 0

    def count(self, stage: int, device: int) -> int:
        """Return how many microbatches `device` runs on `stage`."""
        return self.problem.device_of[stage].count(device)

    def recomputing(self, stage: int, device: int) -> int:
        """Return how many of these recompute."""
        p = self.problem
        owners = zip(p.device_of[stage], p.recomputes, strict=True)
        return sum(recomputes and owner == device for owner, recomputes in owners)
