"""`fully_shard` inside a pipeline: gathered and reduced when instructions say so.

Problem: FSDP2 gathers and reduces from hooks around forward and backward, so with microbatches it
would reduce once for each, by the mean over ranks; and where a backward is split, its hook reduces
before the weights' gradients are there.
Idea: the hooks still cast (mixed precision), but neither gather, reshard nor reduce: instructions
of the program do (`schedule.sharded`), so that gathers start ahead and a stage's reduction runs
while others compute. Gradients are sums, not means, since losses carry their share of the whole
batch. A reduction may be of a step that then fails elsewhere: `.grad` was set aside
(`replicas`), and gets the sum, or what it was, only once all ranks know how the step ended. What a
rank has no gradient of, or all of a step that failed here, it adds as zeros.
Only this file uses torch's private names of FSDP2.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed._composable import replicate as replicate_by_hooks  # type: ignore[attr-defined]
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.nn.parallel import DistributedDataParallel

from stagewise.engine.gradients.policy import ParameterPolicy, Settlement
from stagewise.engine.gradients.shard_actions import Gathered
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.wires.group import Group
from stagewise.errors import ModelError


def refuse_own_sums(stages: Iterable[nn.Module]) -> None:
    """Raise ModelError for a module that sums its gradients over ranks in every backward."""
    for module in dict.fromkeys(m for stage in stages for m in stage.modules()):
        by_hooks: Any = replicate_by_hooks
        if by_hooks.state(module) is not None or isinstance(module, DistributedDataParallel):
            raise ModelError(
                f"a {type(module).__name__} averages its gradients over ranks after every "
                "backward, but a pipeline runs one for each microbatch; leave replicate and "
                "DistributedDataParallel out: what no data axis shards is summed over all of them "
                "once a step"
            )


def _state_of(module: FSDPModule) -> Any:
    kind: Any = replicate if _is_replicated(module) else fully_shard
    return kind.state(module)


def _groups_of(state: Any) -> Sequence[Any]:
    """Return a state's groups of parameters, of which torch before 2.12 has at most one."""
    several = getattr(state, "_fsdp_param_groups", None)
    return [g for g in [state._fsdp_param_group] if g is not None] if several is None else several


def _is_replicated(module: object) -> bool:
    return isinstance(module, ReplicateModule)


class ShardedUnit(Gathered):
    """The modules of one or more stages' trees that `fully_shard` was applied to."""

    def __init__(self, modules: Sequence[FSDPModule]) -> None:
        self.modules = modules
        self.states = list(dict.fromkeys(map(_state_of, modules)))
        self.groups = [g for state in self.states for g in _groups_of(state)]
        self.members = [member for group in self.groups for member in group.fsdp_params]
        self.had: dict[Any, bool] = {}  # by member: a gradient here, before the reduction

    def start(self) -> None:
        for module in self.modules:
            module.unshard(async_op=True)

    def complete(self) -> None:
        for group in self.groups:
            group.wait_for_unshard()

    def release(self) -> None:
        for group in self.groups:
            group._training_state = TrainingState.IDLE
            group.reshard()

    @torch.no_grad()
    def reduce(self) -> None:
        for member in self.members:
            if member.sharded_param.requires_grad:
                self.had[member] = _gradient(member) is not None
                if not self.had[member]:
                    member.unsharded_param.grad = torch.zeros_like(member.unsharded_param)
                member.accumulate_unsharded_grad_if_needed()
                member.to_accumulated_grad_if_needed()  # all of a group in its reduce_dtype
        for group in reversed(self.groups):
            group.reduce_grads = group.all_reduce_grads = True
            try:
                group.post_backward()
            finally:
                group.reduce_grads = group.all_reduce_grads = False

    def finish(self) -> None:
        """Wait for the reductions."""
        for state in self.states:
            if state._is_root:
                state._state_ctx.is_last_backward = True
                state._root_post_backward_final_callback()
                state._state_ctx.is_last_backward = False

    def reset(self) -> None:
        """Shard everything again, as before the call, without what a failed one left."""
        self.had.clear()
        for state in self.states:
            state._training_state = TrainingState.IDLE
            state._modules_to_run_forward.clear()
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
            state._comm_ctx.post_forward_order.clear()
        for group in self.groups:
            group._all_gather_result = None
            group._post_forward_indices.clear()
        self.release()
        for member in self.members:
            member.unsharded_accumulated_grad = None
            if hasattr(member, "_unsharded_param"):
                member._unsharded_param.grad = None


class FullySharded(ParameterPolicy):
    """The modules of this rank's stages, by `trees`, that `fully_shard` was applied to.

    `over_data`: the ranks with other parts of the batch, which agree on which parameters have
    gradients; None if there are none.
    """

    def __init__(self, trees: Iterable[nn.Module], over_data: Group | None) -> None:
        found = [[m for m in tree.modules() if isinstance(m, FSDPModule)] for tree in trees]
        for state in dict.fromkeys(_state_of(m) for modules in found for m in modules):
            state._lazy_init()  # the outermost of a stage comes first, so it becomes the root
        self._units = [ShardedUnit(modules) for modules in found if modules]
        self._over_data, self._now = over_data, self._units
        for unit in self._units:
            _silence(unit)

    @property
    def parameters(self) -> dict[nn.Parameter, frozenset[int]]:
        """The sharded parameters, with the ranks that their gradients are summed over."""
        return {
            member.sharded_param: frozenset(_ranks_of(group.mesh_info))
            for unit in self._units
            for group in unit.groups
            for member in group.fsdp_params
        }

    def gathered(self, stages: Mapping[int, Stage]) -> Mapping[int, Gathered]:
        """Stages that were cut anew may share a unit, or have several: these are gathered at once.

        All have the same object then.
        """
        of_module = {m: unit for unit in self._units for group in unit.groups for m in _of(group)}
        together: dict[ShardedUnit, set[ShardedUnit]] = {unit: {unit} for unit in self._units}
        own: dict[int, ShardedUnit] = {}
        for index, stage in stages.items():
            modules = (m for cell in stage.cells for m in cell.module.modules())
            used = {of_module[m] for m in modules if m in of_module}
            if used:
                own[index] = next(iter(used))
                joined = set().union(*(together[unit] for unit in used))
                together |= dict.fromkeys(joined, joined)
        made: dict[int, ShardedUnit] = {}
        for joined in {id(each): each for each in together.values()}.values():
            several = [unit for unit in self._units if unit in joined]
            one = (
                several[0]
                if len(several) == 1
                else ShardedUnit([m for u in several for m in u.modules])
            )
            made[id(joined)] = one
        self._now = [*made.values()]
        return {index: made[id(together[unit])] for index, unit in own.items()}

    def before_step(self, step: Settlement) -> None:
        self._reset()

    def after_inference(self) -> None:
        self._reset()

    @torch.no_grad()
    def settle(self, step: Settlement) -> None:
        """Wait for all sums, and drop those of parameters that no rank has a gradient of."""
        for unit in self._now:
            unit.finish()
        had = {member: has for unit in self._now for member, has in unit.had.items()}
        flags = torch.tensor([float(has) for has in had.values()])
        if self._over_data is not None and had:
            self._over_data.start_sum(flags)()
        for member, anywhere in zip(had, flags.tolist(), strict=True):
            if not anywhere:
                member.sharded_param.grad = None
        self._reset()

    def undo(self, step: Settlement, error: BaseException) -> None:
        """Drop the gradients of a failed step."""
        if step.failed_on_all:
            for unit in self._now:
                unit.finish()
        self._reset()

    def _reset(self) -> None:
        for unit in self._now:
            unit.reset()


def _silence(unit: ShardedUnit) -> None:
    """Keep the hooks of forward and backward from gathering, resharding and reducing."""
    for module in unit.modules:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_is_last_backward(False)
        module.set_requires_gradient_sync(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        if not _is_replicated(module):
            module.set_reshard_after_forward(False, recurse=False)
    for state in unit.states:
        if state._mp_policy.reduce_dtype is None:  # else it sums in that, after each backward
            state._register_pre_backward_hook = _same
        for group in _groups_of(state):
            group._register_post_backward_hook = _both  # it would make graphs indivisible


def _same(output: Any) -> Any:
    return output


def _both(args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def _gradient(member: Any) -> Any:
    if member.unsharded_accumulated_grad is not None:
        return member.unsharded_accumulated_grad
    return member.unsharded_param.grad


def _ranks_of(mesh_info: Any) -> Sequence[int]:
    ranks: list[int] = mesh_info.mesh.mesh.flatten().tolist()
    return ranks


def _of(group: Any) -> Iterator[nn.Module]:
    """Yield the modules that have parameters of this group."""
    for member in group.fsdp_params:
        yield from (member._module_info.module, *member._module_info.shared_modules)
