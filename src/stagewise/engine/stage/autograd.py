"""How a stage cuts its graph out of the model's, and under which autocast it runs.

A stage's graph begins at leaves of its own, so that no backward runs on into another stage's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.graph import GradientEdge, _engine_run_backward

from stagewise.batch.values import is_marked, mark_shared

_Prehook = Callable[[tuple[torch.Tensor, ...]], tuple[None, ...]]
_NOTHING = nullcontext()


def leaf_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a leaf, which needs a gradient if `tensor` does."""
    if tensor.is_inference():  # autograd cannot work with it, and it counts no versions
        return tensor.clone()
    leaf = tensor.detach()
    if tensor.requires_grad:
        leaf.requires_grad_()
    return mark_shared(leaf) if is_marked(tensor) else leaf


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


def keeping(gradients: list[torch.Tensor | None], index: int) -> _Prehook:
    """A hook that takes an input's gradient as the plain model would pass it on.

    `leaf.grad` would not do: accumulating there changes its strides.
    """

    def hook(received: tuple[torch.Tensor, ...]) -> tuple[None, ...]:
        (gradients[index],) = received
        return (None,)

    return hook


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
