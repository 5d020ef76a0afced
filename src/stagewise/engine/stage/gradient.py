"""One gradient: dense, with the strides autograd would choose, wide where sums are in float32."""

from collections.abc import Hashable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Gradient = torch.Tensor | None


def taken(parameter: torch.Tensor) -> Gradient:
    """What was in its `.grad`, which is empty from now on."""
    gradient, parameter.grad = parameter.grad, None
    return gradient


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


class WideSums:
    """Sums in float32 of gradients of low precision, by key, which leave `.grad` at once."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def follow(self, key: Hashable, leaf: torch.Tensor) -> None:
        """Let every gradient that arrives at `leaf` go to the sum of `key`."""

        def move(leaf: torch.Tensor) -> None:
            gradient = taken(leaf)
            if gradient is not None:  # else a hook of the user's has taken it
                self.add(key, gradient)

        self._handles.append(leaf.register_post_accumulate_grad_hook(move))  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Follow no leaf any more."""
        while self._handles:
            self._handles.pop().remove()

    def add(self, key: Hashable, gradient: torch.Tensor) -> None:
        """Add to the sum of `key`; the first one, if it is float32, becomes the sum."""
        if key in self._sums:
            self._sums[key].add_(gradient)
        else:
            self._sums[key] = gradient.float()

    def pop(self, key: Hashable) -> Gradient:
        """The sum of `key`, which is then forgotten; None if nothing was added."""
        return self._sums.pop(key, None)
