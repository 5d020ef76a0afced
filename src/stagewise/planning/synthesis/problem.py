"""A scheduling problem as flat arrays: what the synthesiser's inner loops read.

Problem: the simulator's dataclasses are clear but slow, and a synthesiser replays thousands of
schedules. Idea: number the operations, and look up what each takes, waits for, sends and keeps.
An operation is an int: (kind * num_stages + stage) * num_microbatches + microbatch, for the kinds
F, B, I, W in this order; a recomputation is no operation of its own, it is the first part of its
backward (`with_recompute` puts it there). `replay` gives the seconds of `simulate` exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.errors import PlanError
from stagewise.schedule import POLICIES, Instruction, Kind, Schedule, with_recompute

KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)
NEVER = float("inf")

Programs = list[list[int]]  # operations per device, in order


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Placement, costs and caps; arrays are per operation unless said otherwise.

    `needs[op]` is the arrival that op waits for and `fills[op]` the one that it causes, -1 for
    none; `link_of[op]` numbers the pair of devices that its message crosses, -1 where it stays.
    `recompute_seconds[op]` comes before a backward that recomputes, but for one that directly
    follows its own forward on the last stage (`fresh`).
    """

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
    seconds: list[float]
    recompute_seconds: list[float]
    needs: list[int]
    fills: list[int]
    reaches: list[int]  # the device where its message arrives
    link_of: list[int]
    transfer_seconds: list[float]
    num_links: int

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @cached_property
    def cycle(self) -> int:
        """After so many microbatches the devices that run one repeat."""
        return math.lcm(*(len(devices) for devices in self.placement))

    def op(self, kind: int, stage: int, microbatch: int) -> int:
        """The number of an operation."""
        return (kind * self.num_stages + stage) * self.num_microbatches + microbatch

    def parts(self, op: int) -> tuple[int, int, int]:
        """Kind, stage and microbatch of an operation."""
        rest, microbatch = divmod(op, self.num_microbatches)
        return rest // self.num_stages, rest % self.num_stages, microbatch

    def input_bytes(self, stage: int, microbatch: int) -> int:
        """What `stage` keeps of its input besides what the stage before keeps on its device."""
        return 0 if self.lends(stage, microbatch) else self.costs[stage].input_bytes

    def lends(self, stage: int, microbatch: int) -> bool:
        """Whether the stage before keeps, on the same device, what `stage` was given."""
        if not stage or self.recomputes[microbatch]:
            return False
        return self.device_of[stage - 1][microbatch] == self.device_of[stage][microbatch]

    def least_deferred_bytes(self, stage: int) -> int:
        """The least that waits for `W`, while the stage before may keep the input besides."""
        cost = self.costs[stage]
        lent = any(self.lends(stage, m) for m in range(self.num_microbatches))
        return cost.deferred_bytes - (cost.deferred_input_bytes if lent else 0)

    def whole_bytes(self, stage: int, microbatch: int) -> int:
        """What a microbatch keeps on `stage` while its graph exists."""
        return self.input_bytes(stage, microbatch) + self.costs[stage].activation_bytes

    def fresh(self, previous: int, op: int) -> bool:
        """Does backward `op` follow its own forward `previous` on the last stage?"""
        _, stage, m = self.parts(op)
        return stage == self.num_stages - 1 and previous == self.op(FORWARD, stage, m)

    def schedule(self, name: str, programs: Programs) -> Schedule:
        """The schedule of `programs`, recomputations included."""

        def instruction(op: int) -> Instruction:
            kind, stage, m = self.parts(op)
            return Instruction(stage, KINDS[kind], m)

        plain = Schedule(
            name=name,
            programs=tuple(tuple(map(instruction, program)) for program in programs),
            placement=self.placement,
            num_microbatches=self.num_microbatches,
        )
        return with_recompute(plain, self.recompute)

    def programs(self, schedule: Schedule) -> Programs:
        """The operations of a schedule, its recomputations left out."""
        kinds = {kind: index for index, kind in enumerate(KINDS)}
        return [
            [
                self.op(kinds[i.kind], i.stage, i.microbatch)
                for i in program
                if i.kind is not Kind.RECOMPUTE
            ]
            for program in schedule.programs
        ]

    def with_split(self, split: bool) -> "Problem":
        """The same problem with or without `I` and `W`."""
        return replace(self, split=split)


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
    """Check the arguments of `synthesise` and lay them out."""
    placed = tuple(map(tuple, placement))
    num_stages = len(placed)
    if len(costs) != num_stages or not num_stages:
        raise PlanError(f"got costs of {len(costs)} stages for a placement of {num_stages}")
    if any(not devices or len(set(devices)) != len(devices) for devices in placed):
        raise PlanError(f"placement {placed} must name each stage's devices, each of them once")
    if num_microbatches < 1:
        raise PlanError(f"num_microbatches is {num_microbatches}; a schedule needs at least 1")
    if recompute not in POLICIES:
        raise PlanError(
            f"there is no recompute policy {recompute!r}; choose one of "
            f"{', '.join(sorted(POLICIES))}"
        )
    num_devices = 1 + max(device for devices in placed for device in devices)
    stages_of = [[s for s in range(num_stages) if d in placed[s]] for d in range(num_devices)]
    microbatches = range(num_microbatches)
    recomputes = [POLICIES[recompute](m, num_microbatches) for m in microbatches]
    device_of = [[devices[m % len(devices)] for m in microbatches] for devices in placed]
    by_kind = [
        [c.forward_seconds for c in costs],
        [c.backward_seconds for c in costs],
        [c.input_seconds for c in costs],
        [c.weight_seconds for c in costs],
    ]
    seconds, again = [], []
    needs, fills, reaches, link_of, transfers = [], [], [], [], []
    links: dict[tuple[int, int], int] = {}
    half = num_stages * num_microbatches
    for kind in (FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT):
        for stage in range(num_stages):
            target = (stage + 1, stage - 1, stage - 1, -1)[kind]
            inside = 0 <= target < num_stages
            where = half * (kind != FORWARD)
            waits = kind != BACKWARD_WEIGHT and 0 <= 2 * stage - target < num_stages
            size = costs[stage].output_bytes if kind == FORWARD else costs[target].gradient_bytes
            took = link.transfer_seconds(size) if inside else 0
            for m in microbatches:
                seconds.append(by_kind[kind][stage])
                backward = kind in (BACKWARD, BACKWARD_INPUT) and recomputes[m]
                again.append(costs[stage].recompute_seconds if backward else 0)
                needs.append(where + stage * num_microbatches + m if waits else -1)
                fills.append(where + target * num_microbatches + m if inside else -1)
                source = device_of[stage][m]
                reached = device_of[target][m] if inside else -1
                reaches.append(reached)
                far = inside and reached != source
                link_of.append(links.setdefault((source, reached), len(links)) if far else -1)
                transfers.append(took)
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
        stages_of=stages_of,
        recomputes=recomputes,
        seconds=seconds,
        recompute_seconds=again,
        needs=needs,
        fills=fills,
        reaches=reaches,
        link_of=link_of,
        transfer_seconds=transfers,
        num_links=len(links),
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
