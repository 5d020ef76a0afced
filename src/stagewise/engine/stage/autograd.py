"""How a stage cuts its graph out of the model's, and under which autocast it runs.

A stage's graph begins at leaves of its own, so that no backward runs on into another stage's.
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
    """A copy with the same strides, since they decide in which order kernels sum.

    What shares memory with itself (`expand`) cannot be changed in place and needs no copy.
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
    gradients: list[torch.Tensor | None],
) -> tuple[list[torch.Tensor], list[Node]]:
    """What cells are given for `leaves`, and the nodes where their graph begins.

    Of those that are `mutated` (None: that may be) a copy, of others a view. The graph's backward
    leaves the gradient of leaf i in `gradients[i]`, as the plain model would pass it on:
    accumulating in `leaf.grad` would change its strides.
    """
    fed: list[torch.Tensor] = []
    entries: list[Node] = []
    for index, leaf in enumerate(leaves):
        tensor = copy_of(leaf) if mutated is None or mutated[index] else leaf[...]
        node = tensor.grad_fn
        if node is not None:
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
    """Raise CellError if cells may not have changed in place what was `received`, or was fed.

    `known` tells which they did before. What cells are given by name is each one's own.
    """
    if known is None and any(map(operator.and_, changed, shared(received))):
        raise CellError(
            f"a cell of stage {stage} changed a tensor in place that shares memory with another "
            "one from the stage before (a view of it?), which keeps its old value there; let the "
            "cell before return a clone, or change a clone of it"
        )
    if known is not None and any(map(operator.gt, changed, known)):
        raise CellError(
            f"stage {stage} changed an input in place on microbatch {m}, but not on the first; "
            "make its first cell change its input always or never"
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
    """`torch.autograd.backward` where every root has a gradient of its form.

    That checks forms first, in Python, which takes half as long as a small graph.
    """
    _engine_run_backward(
        tuple(roots),
        tuple(gradients),
        keep_graph,
        False,  # no graph of the gradients
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off, as backward wants it."""
    if not torch.is_autocast_enabled(device_type):
        return _NOTHING
    return torch.autocast(device_type, enabled=False)


def without_weight_cache(device_type: str) -> AbstractContextManager[object]:
    """The caller's autocast without its weight cache.

    The cache would hand weights cast under no_grad to a recomputation, whose graph would then
    miss them.
    """
    if not torch.is_autocast_enabled(device_type):
        return _NOTHING
    dtype = torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype=dtype, cache_enabled=False)
