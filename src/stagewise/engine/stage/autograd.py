"""How a stage separates its graph from the model's, and under which autocast it runs.

A stage's graph begins at its own leaves, so that backward never runs on into another stage.
"""

import functools
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward

from stagewise.batch.values import shared
from stagewise.errors import CellError

_NOTHING = nullcontext()


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Copy `tensor` with its strides, which decide the order in which kernels sum.

    A tensor that overlaps itself (`expand`) cannot be changed in place, so a view will do.
    """
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    if any(stride == 0 < size - 1 for stride, size in axes):
        return tensor[...]
    empty = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return empty.copy_(tensor)


def feed(
    leaves: Sequence[torch.Tensor],
    mutated: Sequence[bool] | None,
    gradients: list[torch.Tensor | None] | None,
) -> tuple[list[torch.Tensor], list[Node]]:
    """Return the tensors to give to cells for `leaves`, and the nodes where the graph begins.

    Leaves that cells mutate (`mutated`; None: unknown, so all) are copied, others viewed. Backward
    stores the gradient of leaf i in `gradients[i]` as the plain model would pass it on:
    accumulating into `leaf.grad` would change its strides. None: the graph will have no backward.
    """
    fed: list[torch.Tensor] = []
    entries: list[Node] = []
    for index, leaf in enumerate(leaves):
        tensor = copy_of(leaf) if mutated is None or mutated[index] else leaf[...]
        if gradients is not None and (node := tensor.grad_fn) is not None:
            node.register_prehook(functools.partial(_keep, gradients, index))
            entries.append(node)
        fed.append(tensor)
    return fed, entries


def check_changes(
    stage: int,
    received: Sequence[torch.Tensor],
    changed: Sequence[bool],
    known: Sequence[bool] | None,
    m: int,
) -> None:
    """Raise CellError for an in-place change of an input that cannot be reproduced exactly.

    `known` says which inputs were changed before (None: first run). `received` leaves out keyword
    arguments, of which every cell has its own.
    """
    if known is None and any(map(operator.and_, changed, shared(received))):
        raise CellError(
            f"a cell of stage {stage} changed in place a tensor that shares memory with another "
            "output of the previous stage (a view of it?), which would keep its old value; return "
            "a clone from the previous cell, or change a clone"
        )
    if known is not None and any(map(operator.gt, changed, known)):
        raise CellError(
            f"stage {stage} changed an input in place on microbatch {m}, but not on the first; "
            "its first cell must change its input always or never"
        )


def restore_grad_mode(stage: int, m: int, *, training: bool) -> None:
    """Set grad mode as it was before cells changed it; raise CellError if they disabled it."""
    torch.set_grad_enabled(training)
    if training:
        raise CellError(
            f"the cells of stage {stage} left gradients disabled after microbatch {m}; use "
            "`with torch.no_grad():`, or cut the model so that the same stage enables them again"
        )


def _keep(
    gradients: list[torch.Tensor | None], index: int, received: tuple[torch.Tensor, ...]
) -> tuple[None]:
    (gradients[index],) = received
    return (None,)


def run_backward(
    roots: Sequence[torch.Tensor | GradientEdge],
    gradients: Sequence[torch.Tensor],
    inputs: Sequence[GradientEdge] = (),
    *,
    keep_graph: bool = False,
) -> None:
    """Run `torch.autograd.backward` without its checks: each gradient must match its root.

    Those checks, in Python, cost half the time of a small graph.
    """
    _engine_run_backward(
        tuple(roots),
        tuple(gradients),
        keep_graph,
        False,  # create_graph
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Disable autocast, as backward requires."""
    if not torch.is_autocast_enabled(device_type):
        return _NOTHING
    return torch.autocast(device_type, enabled=False)


def without_weight_cache(device_type: str) -> AbstractContextManager[object]:
    """Keep the caller's autocast, but without its weight cache.

    The cache would give a recomputation weights that were cast under no_grad, and its graph would
    then miss them.
    """
    if not torch.is_autocast_enabled(device_type):
        return _NOTHING
    dtype = torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype=dtype, cache_enabled=False)
