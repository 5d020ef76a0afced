"""The form of a gradient: dense, with autograd's strides, float32 where sums are wide."""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Gradient = torch.Tensor | None


def taken(parameter: torch.Tensor) -> Gradient:
    """Return `parameter.grad` and set it to None."""
    gradient, parameter.grad = parameter.grad, None
    return gradient


def dense_like(parameter: torch.Tensor, value: Gradient) -> Gradient:
    """Return `value` dense, on the device of `parameter`, with the strides autograd would use."""
    if value is None:
        return None
    if value.layout is not torch.strided:
        value = value.to_dense()
    value = value.to(parameter.device)
    if value.stride() == parameter.stride() and value.is_contiguous():
        return value
    empty = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    return value if value.stride() == empty.stride() else empty.copy_(value)


def wide(parameter: nn.Parameter) -> torch.Tensor:
    """Return a tensor of the form of its gradient's sum: float32 for low precision."""
    if parameter.dtype not in LOW_PRECISION:
        return parameter
    return torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)


def plus(one: Gradient, other: Gradient) -> Gradient:
    """Return the sum, with None as zero."""
    if one is None or other is None:
        return one if other is None else other
    return one + other


def accumulate(parameter: nn.Parameter, total: torch.Tensor) -> None:
    """Accumulate `total` into `.grad` as autograd does, running the parameter's hooks once."""
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
    """Float32 sums of low-precision gradients, by key, which are moved out of `.grad` at once."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def follow(self, key: Hashable, leaf: torch.Tensor) -> None:
        """Move every gradient that arrives at `leaf` into the sum of `key`."""

        def move(leaf: torch.Tensor) -> None:
            gradient = taken(leaf)
            if gradient is not None:  # else a user's hook has taken it
                self.add(key, gradient)

        self._handles.append(leaf.register_post_accumulate_grad_hook(move))  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Stop following all leaves."""
        while self._handles:
            self._handles.pop().remove()

    def add(self, key: Hashable, gradient: torch.Tensor) -> None:
        """Add to the sum of `key`; a first float32 gradient itself becomes the sum."""
        if key in self._sums:
            self._sums[key].add_(gradient)
        else:
            self._sums[key] = gradient.float()

    def pop(self, key: Hashable) -> Gradient:
        """Remove and return the sum of `key`; None if nothing was added."""
        return self._sums.pop(key, None)


@contextmanager
def gradients_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Clear `.grad` inside, and restore it afterwards."""
    before = {parameter: taken(parameter) for parameter in dict.fromkeys(parameters)}  # tied: once
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient
