"""List scheduling: build a schedule in order of time, with a rule for what a free device runs.

Problem: which ready operation a device should run next depends on costs, links and memory caps.
Idea: one event loop with a `Rule` that decides; many rules are tried and the best result is kept.
Invariant (no deadlock): a device can always finish every microbatch it holds, oldest first
(`memory_safety`), and limits never delay its oldest. The oldest unfinished microbatch of all is the
oldest on every device, so it can always proceed.
"""

import heapq
from dataclasses import dataclass, field

from stagewise.planning.synthesis.heads_and_tails import HeadsAndTails
from stagewise.planning.synthesis.memory_safety import Memory
from stagewise.planning.synthesis.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
)
from stagewise.planning.synthesis.problem import NEVER, Problem, Programs
from stagewise.planning.synthesis.rules import Rule


def list_schedule(problem: Problem, rule: Rule, bounds: HeadsAndTails) -> Programs | None:
    """Return the programs that `rule` builds; None if its split does not fit one microbatch."""
    memory = Memory(problem, rule.split)
    if memory.shortage() is not None:
        return None
    return _Run(problem, rule, memory, bounds).programs()


@dataclass(kw_only=True)
class _Device:
    """A device's queues and what it holds."""

    cap: float
    most: int  # the most bytes that one of its microbatches needs
    forwards: dict[int, list[int]]  # per stage: heap of microbatches that have arrived
    backwards: dict[int, list[int]]
    not_begun: list[int]  # its microbatches, last one first
    between: dict[int, int]  # per stage: microbatches between F and backward
    coming: list[tuple[float, int]] = field(default_factory=list)  # heap of (time, operation)
    weights: list[int] = field(default_factory=list)  # deferred W, in order
    next_weight: int = 0
    used: int = 0
    held: dict[int, list[int]] = field(default_factory=dict)  # microbatch -> [bytes, backwards]
    begun: set[int] = field(default_factory=set)
    free: float = 0
    asleep: bool = False
    forced: int = -1  # the backward that must run next
    program: list[int] = field(default_factory=list)


class _Run:
    """One run of the event loop."""

    def __init__(self, problem: Problem, rule: Rule, memory: Memory, bounds: HeadsAndTails) -> None:
        self.problem, self.rule, self.memory, self.bounds = problem, rule, memory, bounds
        self.last = problem.num_stages - 1
        self.link_free: list[float] = [0] * problem.num_links
        self.far: dict[int, float] = {}  # when what passes other stages arrives
        self.left = [problem.num_microbatches] * problem.num_stages  # forwards not begun
        self.backwards_left = list(self.left)
        self.devices = []
        for d in range(problem.num_devices):
            stages = problem.stages_of[d]
            own = {m for s in stages for m, e in enumerate(problem.device_of[s]) if e == d}
            device = _Device(
                cap=problem.caps[d],
                most=memory.most(d) if problem.caps[d] != NEVER else 0,
                forwards={s: [] for s in stages},
                backwards={s: [] for s in stages},
                not_begun=sorted(own, reverse=True),
                between=dict.fromkeys(stages, 0),
            )
            self.devices.append(device)
        for m, d in enumerate(problem.device_of[0]):
            self.devices[d].forwards[0].append(m)

    def programs(self) -> Programs:
        """Run the event loop to its end."""
        devices = self.devices
        events: list[tuple[float, int]] = [(0, d) for d in range(len(devices))]
        while events:
            now, d = heapq.heappop(events)
            device = devices[d]
            if device.free > now:
                continue
            op = self._choose(d, device, now)
            if op < 0:
                device.asleep = True
                if device.coming:
                    heapq.heappush(events, (device.coming[0][0], d))
                continue
            device.asleep = False
            woken = self._begin(device, op, now)
            heapq.heappush(events, (device.free, d))
            if woken >= 0:
                heapq.heappush(events, (max(now, devices[woken].coming[0][0]), woken))
        assert not any(self.backwards_left), "list scheduling is deadlocked"
        return [device.program for device in devices]

    def _begin(self, device: _Device, op: int, now: float) -> int:
        """Run `op` from `now`; return the sleeping device that its message wakes, or -1."""
        p = self.problem
        kind, stage, m = p.parts(op)
        pause = 0 if op == device.forced else p.recompute_seconds[op]
        device.forced = -1
        device.program.append(op)
        now += pause + p.seconds[op]
        self._account(device, kind, stage, m)
        if kind == FORWARD and stage == self.last:
            follow = self._back(stage, m)
            if p.recomputes[m]:
                device.forced = follow
            else:
                heapq.heappush(device.coming, (now, follow))
        fill = p.fills[op]
        device.free = now
        if fill < 0:
            return -1
        arrival = now
        if p.link_of[op] >= 0:
            link = p.link_of[op]
            device.free = now + p.link.overhead_seconds
            leaves = max(device.free, self.link_free[link])
            arrival = self.link_free[link] = leaves + p.transfer_seconds[op]
        for goal, link, took in p.far.get(op, ()):
            device.free += p.link.overhead_seconds
            self.link_free[link] = max(device.free, self.link_free[link]) + took
            self.far[goal] = max(self.link_free[link], self.far.get(goal, 0))
        arrival = max(arrival, self.far.get(fill, arrival))
        if kind == FORWARD:
            follow = (stage + 1) * p.num_microbatches + m
        else:
            follow = p.op(BACKWARD, stage - 1, m)
            arrival -= p.recompute_seconds[follow]
        reached = p.reaches[op]
        receiver = self.devices[reached]
        heapq.heappush(receiver.coming, (arrival, follow))
        return reached if receiver.asleep else -1

    def _back(self, stage: int, m: int) -> int:
        """Return the backward of microbatch m that would run now: whole, or its first half."""
        is_split = self.rule.split[stage] and not self._may_wait(stage, m)
        return self.problem.op(BACKWARD_INPUT if is_split else BACKWARD, stage, m)

    def _may_wait(self, stage: int, m: int) -> bool:
        """Return whether the device that needs this gradient has enough other work meanwhile."""
        p, slack = self.problem, self.rule.whole_slack
        if not slack or not stage:
            return bool(slack)
        device = self.devices[p.device_of[stage - 1][m]]
        forward, inputs = p.stage_seconds[FORWARD], p.stage_seconds[BACKWARD_INPUT]
        work = sum(len(ready) * forward[s] for s, ready in device.forwards.items())
        work += sum(len(ready) * inputs[s] for s, ready in device.backwards.items())
        work += sum(p.seconds[op] for op in device.weights[device.next_weight :])
        return work >= slack * p.seconds_of(BACKWARD, stage)

    def _account(self, device: _Device, kind: int, stage: int, m: int) -> None:
        """Record what `kind` keeps and frees, and remove it from its queue."""
        if kind == BACKWARD_WEIGHT:
            device.used -= self.memory.deferred[stage]
            device.next_weight += 1
            return
        kept = self.memory.keeps[stage][m]
        if kind == FORWARD:
            heapq.heappop(device.forwards[stage])
            self.left[stage] -= 1
            device.between[stage] += 1
            device.used += kept
            device.held.setdefault(m, [0, 0])[0] += kept
            device.begun.add(m)
            while device.not_begun and device.not_begun[-1] in device.begun:
                device.not_begun.pop()
            return
        if device.backwards[stage] and device.backwards[stage][0] == m:
            heapq.heappop(device.backwards[stage])
        self.backwards_left[stage] -= 1
        device.between[stage] -= 1
        device.used -= kept
        held = device.held[m]
        held[0] -= kept
        held[1] += 1
        if kind == BACKWARD_INPUT:
            device.used += self.memory.deferred[stage]
            device.weights.append(self.problem.op(BACKWARD_WEIGHT, stage, m))
        if held[1] + 1 == len(self.memory.needs(self.problem.device_of[stage][m], m)):
            del device.held[m]

    def _choose(self, d: int, device: _Device, now: float) -> int:
        """Return the operation that starts now, or -1 to wait for the next arrival."""
        if device.forced >= 0:
            return device.forced
        p, rule = self.problem, self.rule
        coming = device.coming
        while coming and coming[0][0] <= now:
            kind, stage, m = p.parts(heapq.heappop(coming)[1])
            heapq.heappush((device.forwards if kind == FORWARD else device.backwards)[stage], m)
        has_weights = device.next_weight < len(device.weights)
        back = self._backward(device)
        if back >= 0 and not rule.forward_first:
            return back
        forward, short = self._forward(d, device)
        if back >= 0:
            return forward if forward >= 0 else back
        if has_weights and (
            short or (len(device.weights) - device.next_weight > rule.backlog and forward >= 0)
        ):
            return device.weights[device.next_weight]
        if forward >= 0:
            soon = now + rule.patience * p.seconds[forward]
            first_backward = p.num_stages * p.num_microbatches
            if rule.patience and any(at < soon and op >= first_backward for at, op in coming):
                return -1
            return forward
        if has_weights:
            weight = device.weights[device.next_weight]
            if not (rule.gap and coming and coming[0][0] < now + rule.gap * p.seconds[weight]):
                return weight
        return -1

    def _backward(self, device: _Device) -> int:
        """Return the best backward that is ready and fits, a W that makes room for one, or -1."""
        best, best_key = -1, (NEVER, NEVER)
        order = self.rule.back_order
        for stage, ready in device.backwards.items():
            if ready:
                m = ready[0]
                if device.used + self.memory.adds[stage][m] > device.cap:
                    continue
                key = self._key(order, stage, m, BACKWARD_INPUT)
                if key < best_key:
                    best, best_key = self._back(stage, m), key
        if best < 0 and any(device.backwards.values()) and device.next_weight < len(device.weights):
            return device.weights[device.next_weight]  # makes room
        return best

    def _forward(self, d: int, device: _Device) -> tuple[int, bool]:
        """Return the best forward that may begin, or -1; and whether a W could make room."""
        best, best_key, short = -1, (NEVER, NEVER), False
        p, rule = self.problem, self.rule
        for stage, ready in device.forwards.items():
            if not ready:
                continue
            m = ready[0]
            oldest = not device.held or m < min(device.held)
            if device.between[stage] >= rule.limits[stage] and not oldest:
                continue
            kept = self.memory.keeps[stage][m]
            if device.used + kept + device.most > device.cap:
                if not self.memory.safe(d, device.held, device.not_begun[-1:], m, kept):
                    continue
                if device.used + kept > device.cap:
                    short = True
                    continue
            key = self._key(rule.order, stage, m, FORWARD)
            if key < best_key:
                best, best_key = stage * p.num_microbatches + m, key
        return best, short

    def _key(self, order: str, stage: int, m: int, kind: int) -> tuple[float, float]:
        """Return the priority of a ready stage; the least goes first."""
        if order == "old":
            return m, -stage
        if order == "deep":
            return -stage, m
        if order == "wide":
            return stage, m
        left = self.bounds.f_left if kind == FORWARD else self.bounds.i_left
        count = self.left if kind == FORWARD else self.backwards_left
        return -left[stage][count[stage]], m
