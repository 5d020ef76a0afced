"""What this rank has of a schedule: its stages, and the programs it runs, bound to them once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from stagewise.batch.lanes import has_streams
from stagewise.batch.values import Apart
from stagewise.engine.gradients.shard_actions import NONE_GATHERED, Gathered, on_shards
from stagewise.engine.stage.buffers import BufferKeeper
from stagewise.engine.stage.keywords import names_taken
from stagewise.engine.stage.stage import Action, Stage
from stagewise.engine.stage.work import Work
from stagewise.engine.step.marks import marked
from stagewise.engine.step.nonfinite import Finder
from stagewise.engine.transport.transport import Links
from stagewise.free_pages import HEAP
from stagewise.mesh import Mesh
from stagewise.planning.simulate import simulate, unit_costs
from stagewise.schedule import (
    Instruction,
    Message,
    Schedule,
    Step,
    forward_only,
    links,
    lower,
    needed,
)
from stagewise.schedule.instruction import KINDS
from stagewise.schedule.posting import PostFrom, post_from
from stagewise.schedule.sharded import with_gathers

_CPU = torch.device("cpu")


class Bound(NamedTuple):
    """An instruction, the callable that runs it, and its messages."""

    device: int
    instruction: Instruction
    action: Action
    receives: tuple[Message, ...]
    sends: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """A rank's stages under a schedule, and what is asked of them in every call."""

    first: Stage | None  # the schedule's first stage, if it is here
    last: Stage | None
    devices: Mapping[torch.device, None]
    device: torch.device  # where the loss goes
    taken: Mapping[torch.device, set[str]]  # names of keyword arguments, on each accelerator
    mesh: Mesh
    last_ranks: Sequence[int]
    replicated: Sequence[int]  # the schedule's stages that are
    keepers: Sequence[BufferKeeper]  # of stages with buffers

    @staticmethod
    def of(stages: Mapping[int, Stage], schedule: Schedule, num_ranks: int) -> "RankShare":
        """Return the share of the rank that has `stages`."""
        devices = [stage.device for stage in stages.values()]
        mesh, last = Mesh(schedule.placement, num_ranks), schedule.num_stages - 1
        return RankShare(
            first=stages.get(0),
            last=stages.get(last),
            devices=dict.fromkeys(devices),
            device=devices[-1] if devices else _CPU,
            taken=names_taken((stage.cells, stage.device) for stage in stages.values()),
            mesh=mesh,
            last_ranks=mesh.ranks_of(last),
            replicated=[s for s, on in enumerate(schedule.placement) if len(on) > 1],
            keepers=[stage.buffers for stage in stages.values() if stage.buffers.owners],
        )


class ProgramKey(NamedTuple):
    """What a rank's program depends on, besides the schedule.

    In training no stage before `first_trained` has a backward, and the `untrained` ones of this
    rank have no gradients of weights. Another part of the batch may have the `most` microbatches.
    """

    training: bool
    num_microbatches: int
    first_trained: int = 0
    untrained: tuple[int, ...] = ()
    most: int = 0


@dataclass(frozen=True, kw_only=True)
class RankProgram:
    """This rank's instructions in order, and the order of messages on its links."""

    key: ProgramKey
    steps: Sequence[Bound]
    instructions: Sequence[Instruction]  # of the steps
    links: Links
    post_from: PostFrom | None  # None on CPUs, where a posted receive blocks nothing
    recomputed: frozenset[tuple[int, int]]  # (stage, microbatch)


class Programs(dict[ProgramKey, RankProgram]):
    """One schedule's programs, created on demand.

    `flows` are the pairs of non-adjacent stages between which skips travel. On a `device` other
    than the CPU, a posted receive holds up what waits for the device. This rank's sharded stages
    are in `gathered`.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage],
        rank: int | None,  # None: this process runs all devices
        flows: Sequence[tuple[int, int]] = (),
        device: torch.device = _CPU,
        finder: Finder | None = None,
        gathered: Mapping[int, Gathered] = NONE_GATHERED,
    ) -> None:
        self._schedule, self._stages, self._rank, self._flows = schedule, stages, rank, flows
        self._finder, self._gathered = finder, gathered
        first = {own: stage for stage, own in sorted(gathered.items(), reverse=True)}
        self._together = {stage: first[own] for stage, own in gathered.items()}
        self._num_devices = len({stage.device for stage in stages.values()})
        self._receives_block = rank is not None and device.type != "cpu"

    def __missing__(self, key: ProgramKey) -> RankProgram:
        schedule = self._schedule_of(key)
        programs = lower(schedule, self._flows)
        if self._rank is None:
            steps = {step.instruction: step for program in programs for step in program}
            own = [(device, steps[i]) for device, i in _in_time_order(schedule)]
        else:
            own = [(self._rank, step) for step in programs[self._rank]]
        bound = [self._bound(device, step) for device, step in own]
        if key.training and schedule.recomputed:
            _give_back_around(bound)
        made = self[key] = RankProgram(
            key=key,
            steps=bound,
            instructions=[step.instruction for _, step in own],
            links=links(programs),
            post_from=post_from(programs) if self._receives_block else None,
            recomputed=schedule.recomputed,
        )
        return made

    def place(self, instruction: Instruction, key: ProgramKey) -> int:
        """Return its position in simulated time, among all devices' instructions."""
        order = _in_time_order(self._schedule_of(key))
        return [other for _, other in order].index(instruction)

    def _bound(self, device: int, step: Step) -> Bound:
        stage = self._stages[step.instruction.stage]
        if KINDS[step.instruction.kind].of_shards:
            action = on_shards(self._gathered[stage.index], step.instruction.kind)
        else:
            action = stage.action(step.instruction)
        if self._finder is not None:
            accumulate = stage.cells if KINDS[step.instruction.kind].is_backward else ()
            action = partial(self._finder.run, action, accumulate, step.instruction.microbatch)
        if self._num_devices > 1 and stage.device.type != "cpu":
            action = partial(_on, stage.device, action)
        if has_streams(stage.device):
            action = partial(_timed, stage.device, step.instruction, action)
        return Bound(device, step.instruction, action, step.receives, step.sends)

    def _schedule_of(self, key: ProgramKey) -> Schedule:
        if key.training:
            schedule = self._schedule.of_first(key.most or key.num_microbatches)
            schedule = needed(schedule, key.first_trained, key.untrained)
        else:
            programs = forward_only(self._schedule.placement, key.most or key.num_microbatches)
            schedule = replace(self._schedule, programs=programs.programs)
        if self._together:
            schedule = with_gathers(schedule, self._together)
        return schedule.of_first(key.num_microbatches)


def _give_back_around(steps: list[Bound]) -> None:
    """Let the first weight gradients of each stage, allocated among activations, leave no holes."""
    stages = set()
    for index, (_, instruction, action, *_) in enumerate(steps):
        if "weights" in KINDS[instruction.kind].parts and instruction.stage not in stages:
            stages.add(instruction.stage)
            steps[index] = steps[index]._replace(action=partial(_trimmed, action))


def _trimmed(action: Action, received: list[Apart], work: Work) -> Any:
    done = action(received, work)
    HEAP.within_step()
    return done


def _on(device: torch.device, action: Action, received: list[Apart], work: Work) -> Any:
    """Run `action` with `device` as the current one, which kernels without a guard use."""
    with torch.get_device_module(device).device(device):
        return action(received, work)


def _timed(
    device: torch.device,
    instruction: Instruction,
    action: Action,
    received: list[Apart],
    work: Work,
) -> Any:
    """Run `action`, whose kernels end long after it returns, between two marks on its stream."""
    with marked(work.marks, instruction, device):
        return action(received, work)


def _in_time_order(schedule: Schedule) -> Iterator[tuple[int, Instruction]]:
    for span in simulate(schedule, unit_costs(schedule.num_stages)).spans:
        yield span.device, span.instruction
