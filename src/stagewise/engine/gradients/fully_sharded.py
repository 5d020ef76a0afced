"""`fully_shard` inside a pipeline: one gather and one reduction a step, whatever the schedule.

Problem: FSDP2 gathers and reduces from hooks around forward and backward, so with microbatches it
would reduce once for each, by the mean over ranks; and where a backward is split, its hook reduces
before the weights' gradients are there.
Idea: the step gathers all parameters before its first instruction and leaves them so. The hooks
still cast (mixed precision), but neither gather, reshard nor reduce: the end of the step does, as
in torch's own pipelines, once all ranks know that the step succeeded. Gradients are sums, not
means, since losses carry their share of the whole batch.
Only this file uses torch's private names of FSDP2.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed._composable import replicate as replicate_by_hooks  # type: ignore[attr-defined]
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.nn.parallel import DistributedDataParallel

from stagewise.engine.gradients.policy import ParameterPolicy, Settlement
from stagewise.engine.transport.ranks import Group
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


class FullySharded(ParameterPolicy):
    """The modules of this rank's `stages` that `fully_shard` was applied to.

    `over_data`: the ranks with other parts of the batch, which agree on which parameters have
    gradients; None if there are none.
    """

    def __init__(self, stages: Iterable[nn.Module], over_data: Group | None) -> None:
        modules = [m for stage in stages for m in stage.modules() if isinstance(m, FSDPModule)]
        self._modules = list(dict.fromkeys(modules))
        self._states = list(dict.fromkeys(map(_state_of, self._modules)))
        self._over_data = over_data
        for state in self._states:
            state._lazy_init()  # the outermost of a stage comes first, so it becomes the root
        self._groups = [g for state in self._states for g in _groups_of(state)]
        self._members = [member for group in self._groups for member in group.fsdp_params]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_is_last_backward(False)
            module.set_requires_gradient_sync(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            if not _is_replicated(module):
                module.set_reshard_after_forward(False, recurse=False)
        for state in self._states:
            if state._mp_policy.reduce_dtype is None:  # else it sums in that, after each backward
                state._register_pre_backward_hook = _same
            for group in _groups_of(state):
                group._register_post_backward_hook = _both  # it would make graphs indivisible

    @property
    def parameters(self) -> dict[nn.Parameter, frozenset[int]]:
        """The sharded parameters, with the ranks that their gradients are summed over."""
        return {
            member.sharded_param: frozenset(_ranks_of(group.mesh_info))
            for group in self._groups
            for member in group.fsdp_params
        }

    def before_step(self, step: Settlement) -> None:
        self._gather()

    def before_inference(self, call: Settlement) -> None:
        self._gather()

    def after_inference(self) -> None:
        self._reset()

    @torch.no_grad()
    def settle(self, step: Settlement) -> None:
        """Reduce all gradients, each into the `.grad` of this rank's part."""
        self._fill_in()
        for group in self._groups:
            group.reduce_grads = group.all_reduce_grads = group.reshard_after_backward = True
        try:
            for group in reversed(self._groups):
                group.post_backward()
            for state in self._states:
                if state._is_root:
                    state._state_ctx.is_last_backward = True
                    state._root_post_backward_final_callback()
                    state._state_ctx.is_last_backward = False
        finally:
            for group in self._groups:
                group.reduce_grads = group.all_reduce_grads = False
                group.reshard_after_backward = False
        self._reset()

    def undo(self, step: Settlement, error: BaseException) -> None:
        """Drop the gradients of a failed step."""
        self._reset()

    def _gather(self) -> None:
        for module in self._modules:
            module.unshard(async_op=True)
        for group in self._groups:
            group.wait_for_unshard()

    def _fill_in(self) -> None:
        """Give a parameter zeros where only other ranks have a gradient: all reduce the same."""
        if self._over_data is None:
            return
        owners = [member for member in self._members if member.sharded_param.requires_grad]
        if not owners:
            return
        has = torch.tensor([float(_gradient(member) is not None) for member in owners])
        self._over_data.start_sum(has)()
        for member, anywhere in zip(owners, has.tolist(), strict=True):
            if anywhere and _gradient(member) is None:
                member.unsharded_param.grad = torch.zeros_like(member.unsharded_param)

    def _reset(self) -> None:
        """Shard everything again, as before the call, without what a failed one left."""
        for state in self._states:
            state._training_state = TrainingState.IDLE
            state._modules_to_run_forward.clear()
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
            state._comm_ctx.post_forward_order.clear()
        for group in self._groups:
            group._training_state = TrainingState.IDLE
            group._post_forward_indices.clear()
            group.reshard()
        for member in self._members:
            member.unsharded_accumulated_grad = None
            if hasattr(member, "_unsharded_param"):
                member._unsharded_param.grad = None


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
