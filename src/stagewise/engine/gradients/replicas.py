"""Replicated stages: several ranks hold the same stage and share its microbatches.

Problem: each replica only sees the gradients of its own microbatches, yet every copy must get the
same sum, once per step, without stalling for it.
Idea: a step's gradients are kept apart from what `.grad` held before. Once a rank has run its last
backward of the stage, it starts one all-reduce of them, flattened (one per dtype), in a process
group of only the replicas, and goes on; the end of the step waits and adds the sum to `.grad`.
A parameter without a gradient here contributes zeros and a 0 in a row of marks, which tells whether
any replica had one; so `.grad` is None where the plain model's is.
Invariant: copies start equal and get the same bits (an all-reduce gives its sum to all).

On a mesh, the ranks of pipelines that run side by side along data axes are replicas of every stage.
A sharded parameter (`Sharding`) is summed over those axes that its owner does not sum over.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.batch.layouts import is_wrapper, parts
from stagewise.engine.gradients.part_sum import PartSum, SharedPart
from stagewise.engine.gradients.policy import ParameterPolicy, Settlement
from stagewise.engine.gradients.shards import NO_SHARDING, Axes, Sharding
from stagewise.engine.stage.batchnorm import layers_of
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.wires.group import Group
from stagewise.schedule import Instruction
from stagewise.schedule.instruction import kinds_with

_LAST_KINDS = kinds_with("weights")


class Replicas(ParameterPolicy):
    """The replicated stages of this rank. Every rank makes one, with the same `placement`.

    `apart` are parameters that cells of other stages also use, which `TiedParameters` sums;
    `within` maps parameters that several cells of one replicated stage use to those cells.
    `sharding` knows the sharded ones.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        placement: Sequence[Sequence[int]],
        ranks: Ranks,
        *,
        apart: Collection[nn.Parameter] = (),
        within: Mapping[nn.Parameter, Sequence[int]] | None = None,
        sharding: Sharding = NO_SHARDING,
    ) -> None:
        self._shared: list[SharedPart] = []
        self._sums: list[PartSum] = []  # of the current step
        self._batchnorms: list[tuple[int, list[_BatchNorm], Group]] = []
        self._equal: list[tuple[list[torch.Tensor], Group]] = []  # what ranks begin with
        self._data_axes, self._sharding = ranks.slices.data_axes, sharding
        self._apart, self._within = apart, within or {}
        for stage, devices in enumerate(placement):
            groups = _Groups(ranks, devices)
            if stage in stages and (len(devices) > 1 or ranks.is_on_mesh):
                self._share(stages[stage], groups)

    def _share(self, stage: Stage, groups: "_Groups") -> None:
        """Note what is summed and exchanged of one stage, in which groups."""
        modules = [cell.module for cell in stage.cells]
        parameters = dict.fromkeys(p for module in modules for p in module.parameters())
        buffers = dict.fromkeys(b for module in modules for b in module.buffers())
        if (everyone := groups.of_copies()) is not None:
            self._equal.append(([*parameters, *buffers], everyone))
        sharding, own = self._sharding, dict[tuple[Axes, bool], list[nn.Parameter]]()
        for parameter in parameters:
            if parameter not in self._apart or parameter in sharding.axes:
                axes = sharding.axes.get(parameter, self._data_axes)
                own.setdefault((axes, parameter in sharding.late), []).append(parameter)
        for (axes, late), together in own.items():
            group = groups.over(axes)
            if group is not None or not sharding.axes.keys().isdisjoint(together):
                part = SharedPart(stage.index, group, together, self._within, self._apart, late)
                self._shared.append(part)
        layers, group = [*layers_of(stage.cells)], groups.over(self._data_axes)
        if layers and group is not None:
            self._batchnorms.append((stage.index, layers, group))

    @property
    def is_needed(self) -> bool:
        """Whether this rank holds a replicated stage."""
        return bool(self._shared or self._batchnorms)

    def broadcast_initial_values(self) -> None:
        """Copy the parameters and buffers of each stage's first rank to the others."""
        for tensors, group in self._equal:
            for tensor in tensors:
                for part in parts(tensor) if is_wrapper(tensor) else (tensor,):
                    group.copy_from_first(part)

    def before_step(self, step: Settlement) -> None:
        self._sums = [PartSum(shared, step) for shared in self._shared]
        ends = {i.stage: i for i in step.program if i.kind in _LAST_KINDS}

        def after(instruction: Instruction) -> None:
            if instruction.kind not in _LAST_KINDS or ends[instruction.stage] != instruction:
                return
            for part in self._sums:
                if part.shared.stage == instruction.stage and not part.shared.is_late:
                    part.start()

        step.observers.append(after)
        for part in self._sums:  # fewer microbatches than replicas: idle
            if part.shared.stage not in ends and not part.shared.is_late:
                part.start()

    def settle(self, step: Settlement) -> None:
        """Wait for all sums and add them; exchange the replicas' BatchNorm statistics."""
        for part in self._sums:
            if part.shared.is_late:
                part.start()
        for part in self._sums:
            part.settle(step)
        for stage, layers, group in self._batchnorms:
            step.batchnorms.exchange(stage, layers, group.gather)
        self._sums = []

    def undo(self, step: Settlement, error: BaseException) -> None:
        """Restore hooks and unsettled gradients."""
        for part in self._sums:
            if step.failed_on_all:
                part.drain()
            part.restore()
        self._sums = []


class _Groups:
    """The groups of one stage's ranks, each made when first asked for, but `devices`' at once."""

    def __init__(self, ranks: Ranks, devices: Sequence[int]) -> None:
        self._ranks, self._devices = ranks, devices
        self._made: dict[Axes, Group | None] = {}
        if not ranks.is_on_mesh:  # also by ranks that do not hold the stage
            self._made[()] = ranks.group(devices) if len(devices) > 1 else None

    def of_copies(self) -> Group | None:
        """Return that of all ranks that hold the stage."""
        every = self._ranks.slices
        if every.beside(every.data_axes, self._devices) == every.beside(None, self._devices):
            return self.over(every.data_axes)
        return self._ranks.group(self._devices, None)

    def over(self, axes: Axes) -> Group | None:
        """Return that of the stage's replicas, also along the data `axes`."""
        if axes not in self._made:
            self._made[axes] = self._ranks.group(self._devices, axes)
        return self._made[axes]
