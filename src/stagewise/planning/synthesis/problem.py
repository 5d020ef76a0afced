"""A scheduling problem as flat arrays, for the synthesiser's inner loops.

Problem: the simulator's dataclasses are clear but slow, and a synthesiser replays thousands of
schedules. Idea: number the operations, and tabulate what each takes, waits for, sends and keeps.
An operation is an int: (kind * num_stages + stage) * num_microbatches + microbatch, for the kinds
F, B, I, W in this order; a recomputation is not a separate operation but the first part of its
backward (`with_recompute` inserts it). `replay` gives exactly the seconds of `simulate`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.errors import PlanError
from stagewise.mesh import device_turns
from stagewise.planning.synthesis.operations import (
    BACKWARD_WEIGHT,
    FORWARD,
    OPERATIONS,
    Operations,
    operations_of,
)
from stagewise.schedule import POLICIES, Instruction, Kind, Schedule, with_recompute
from stagewise.schedule.instruction import KINDS, kinds_with
from stagewise.timeline import Changes, changes_by_kind

NEVER = float("inf")

Programs = list[list[int]]  # operations per device, in order


@dataclass(frozen=True, kw_only=True)
class Problem(Operations):
    """Placement, costs and caps, with the arrays derived from them."""

    placement: tuple[tuple[int, ...], ...]
    costs: tuple[StageCost, ...]
    num_microbatches: int
    num_devices: int
    link: LinkCost
    recompute: str
    split: bool
    caps: tuple[float, ...]  # per device
    device_of: list[list[int]]  # per stage and microbatch
    stages_of: list[list[int]]  # per device, ascending
    recomputes: list[bool]  # per microbatch

    @cached_property
    def num_stages(self) -> int:
        return len(self.placement)

    @cached_property
    def cycle(self) -> int:
        """The period, in microbatches, with which the devices that run them repeat."""
        return math.lcm(*(len(devices) for devices in self.placement))

    @cached_property
    def changes(self) -> Changes:
        """What every kind changes of the bytes kept on every stage."""
        return changes_by_kind(self.costs)

    @cached_property
    def stage_seconds(self) -> list[list[float]]:
        """How long operations take, by kind and stage."""
        every = self.num_stages * self.num_microbatches
        starts = range(0, len(OPERATIONS) * every, every)
        return [self.seconds[at : at + every : self.num_microbatches] for at in starts]

    @cached_property
    def kept_bytes(self) -> list[tuple[int, int]]:
        """What every stage keeps of an input, not shared, and of a graph."""
        whole, graph = KINDS[Kind.FORWARD].bytes_kept, KINDS[Kind.RECOMPUTE].bytes_kept
        return [(whole(cost) - graph(cost), graph(cost)) for cost in self.costs]

    @cached_property
    def own_forward(self) -> list[int]:
        """By operation: the forward that a backward of the last stage rebuilds, elsewhere -1."""
        found, last = [-1] * len(self.seconds), self.num_stages - 1
        for kind, of in enumerate(OPERATIONS):
            for m in range(self.num_microbatches) if "inputs" in KINDS[of].parts else ():
                found[self.op(kind, last, m)] = self.op(FORWARD, last, m)
        return found

    def op(self, kind: int, stage: int, microbatch: int) -> int:
        """Return the number of an operation."""
        return (kind * self.num_stages + stage) * self.num_microbatches + microbatch

    def parts(self, op: int) -> tuple[int, int, int]:
        """Return the kind, stage and microbatch of an operation."""
        rest, microbatch = divmod(op, self.num_microbatches)
        return rest // self.num_stages, rest % self.num_stages, microbatch

    def seconds_of(self, kind: int, stage: int) -> float:
        """Return how long an operation of this kind takes on `stage`."""
        return self.stage_seconds[kind][stage]

    def recompute_seconds_of(self, stage: int) -> float:
        """Return how long a recomputation takes on `stage`."""
        return KINDS[Kind.RECOMPUTE].seconds_on(self.costs[stage])

    def input_bytes(self, stage: int, microbatch: int) -> int:
        """Return what `stage` keeps of its input, not counting what the stage before keeps."""
        own = self.kept_bytes[stage][0]
        return self._unshared(stage, own) if self.shares_input(stage, microbatch) else own

    def _unshared(self, stage: int, num_bytes: int) -> int:
        """Return how many of `num_bytes` of its input the stage before has released."""
        return min(num_bytes, self.costs[stage - 1].released_output_bytes)

    def shares_input(self, stage: int, microbatch: int) -> bool:
        """Return whether the stage before is on the same device, and does not recompute."""
        if not stage or self.recomputes[microbatch]:
            return False
        return self.device_of[stage - 1][microbatch] == self.device_of[stage][microbatch]

    def deferred_bytes(self, stage: int) -> int:
        """Return the bytes that wait for `W`."""
        return KINDS[OPERATIONS[BACKWARD_WEIGHT]].bytes_freed(self.costs[stage])

    def least_deferred_bytes(self, stage: int) -> int:
        """Return the least bytes that wait for `W`; the stage before may keep the input."""
        given, waiting = self.costs[stage].deferred_input_bytes, self.deferred_bytes(stage)
        if not any(self.shares_input(stage, m) for m in range(self.num_microbatches)):
            return waiting
        return waiting - given + self._unshared(stage, given)

    def whole_bytes(self, stage: int, microbatch: int) -> int:
        """Return what a microbatch keeps on `stage` while its graph exists."""
        return self.input_bytes(stage, microbatch) + self.kept_bytes[stage][1]

    def schedule(self, name: str, programs: Programs) -> Schedule:
        """Return the schedule of `programs`, including recomputations."""
        own, _ = _instructions(self.num_stages, self.num_microbatches)
        plain = Schedule(
            name=name,
            programs=tuple(tuple(map(own.__getitem__, program)) for program in programs),
            placement=self.placement,
            num_microbatches=self.num_microbatches,
        )
        return with_recompute(plain, self.recompute)

    def instructions(self, program: list[int]) -> list[Instruction]:
        """Return a device's program as `schedule` would, but faster."""
        own, again = _instructions(self.num_stages, self.num_microbatches)
        recomputes = self.recomputes
        if not any(recomputes):
            return [own[op] for op in program]
        found: list[Instruction] = []
        previous = -1
        for op in program:
            first = again[op]
            at_once = previous >= 0 and previous == self.own_forward[op]
            if first is not None and recomputes[first.microbatch] and not at_once:
                found.append(first)
            found.append(own[op])
            previous = op
        return found

    def programs(self, schedule: Schedule) -> Programs:
        """Return the operations of a schedule, without recomputations."""
        kinds = {kind: index for index, kind in enumerate(OPERATIONS)}
        return [
            [self.op(kinds[i.kind], i.stage, i.microbatch) for i in program if i.kind in kinds]
            for program in schedule.programs
        ]


@lru_cache(maxsize=64)
def _instructions(
    num_stages: int, num_microbatches: int
) -> tuple[list[Instruction], list[Instruction | None]]:
    """Return every operation's instruction, and the recomputation that may come before it."""
    stages, microbatches = range(num_stages), range(num_microbatches)
    own = [Instruction(s, kind, m) for kind in OPERATIONS for s in stages for m in microbatches]
    backwards = kinds_with("inputs")
    return own, [
        Instruction(i.stage, Kind.RECOMPUTE, i.microbatch) if i.kind in backwards else None
        for i in own
    ]


def problem_of(
    placement: Sequence[Sequence[int]],
    costs: Sequence[StageCost],
    num_microbatches: int,
    link: LinkCost = FREE_LINK,
    *,
    memory_bytes: int | Sequence[int] | None = None,
    recompute: str = "never",
    split: bool = True,
) -> Problem:
    """Check the arguments of `synthesise` and return them as a Problem."""
    placed = tuple(map(tuple, placement))
    num_stages = len(placed)
    if len(costs) != num_stages or not num_stages:
        raise PlanError(f"got costs of {len(costs)} stages for a placement of {num_stages}")
    if any(not devices or len(set(devices)) != len(devices) for devices in placed):
        raise PlanError(f"placement {placed} must name the devices of every stage, each only once")
    if num_microbatches < 1:
        raise PlanError(f"num_microbatches is {num_microbatches}; a schedule needs at least 1")
    if recompute not in POLICIES:
        raise PlanError(
            f"there is no recompute policy {recompute!r}; choose one of "
            f"{', '.join(sorted(POLICIES))}"
        )
    num_devices = 1 + max(device for devices in placed for device in devices)
    microbatches = range(num_microbatches)
    recomputes = [POLICIES[recompute](m, num_microbatches) for m in microbatches]
    device_of = [device_turns(devices, num_microbatches) for devices in placed]
    return Problem(
        placement=placed,
        costs=tuple(costs),
        num_microbatches=num_microbatches,
        num_devices=num_devices,
        link=link,
        recompute=recompute,
        split=split,
        caps=_caps(memory_bytes, num_devices),
        device_of=device_of,
        stages_of=[[s for s in range(num_stages) if d in placed[s]] for d in range(num_devices)],
        recomputes=recomputes,
        **vars(operations_of(device_of, costs, link, recomputes)),
    )


def _caps(memory_bytes: int | Sequence[int] | None, num_devices: int) -> tuple[float, ...]:
    if memory_bytes is None:
        return (NEVER,) * num_devices
    if isinstance(memory_bytes, Sequence):
        if len(memory_bytes) != num_devices:
            raise PlanError(
                f"got memory caps of {len(memory_bytes)} devices for a placement on {num_devices}"
            )
        return tuple(memory_bytes)
    return (memory_bytes,) * num_devices
