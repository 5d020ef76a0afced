"""One gradient: dense, with the strides autograd would choose, wide where sums are in float32."""

import torch
from torch import nn

Gradient = torch.Tensor | None


def dense_like(parameter: torch.Tensor, value: Gradient) -> Gradient:
    """`value` dense, on the device of `parameter`, with the strides that autograd would choose."""
    if value is None:
        return None
    if value.layout is not torch.strided:
        value = value.to_dense()
    value = value.to(parameter.device)
    if value.stride() == parameter.stride() and value.is_contiguous():
        return value
    room = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    return value if value.stride() == room.stride() else room.copy_(value)


def wide(parameter: nn.Parameter) -> torch.Tensor:
    """The form of its gradient's sum in float32."""
    if parameter.dtype not in LOW_PRECISION:
        return parameter
    return torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)


def plus(one: Gradient, other: Gradient) -> Gradient:
    """Their sum, where None is nothing."""
    if one is None or other is None:
        return one if other is None else other
    return one + other


def accumulate(parameter: nn.Parameter, total: torch.Tensor) -> None:
    """As autograd does it, hooks included: they see the step's sum, once."""
    for hook in (parameter._backward_hooks or {}).values():
        changed = hook(total)
        total = total if changed is None else changed
    if parameter.grad is None:
        parameter.grad = total
    else:
        parameter.grad.add_(total)
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        hook(parameter)


LOW_PRECISION = (torch.bfloat16, torch.float16)
