"""A loss whose gradients are known before its backward runs.

Problem: a pipeline's backward runs within its step, but a trainer calls backward of the loss that
it gets. Idea: that loss depends on the parameters by a function of its own, whose backward hands
over the gradients; so the trainer may scale the loss, and autograd adds them up.
"""

from collections.abc import Sequence
from typing import Any

import torch


def with_gradients(
    loss: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    parameters: Sequence[torch.nn.Parameter],
) -> torch.Tensor:
    """Return `loss`, whose backward, once, gives the parameters their `gradients`."""
    found: torch.Tensor = _Known.apply(loss, gradients, *parameters)  # type: ignore[no-untyped-call]
    return found


class _Known(torch.autograd.Function):
    """A loss whose gradients are known: its backward hands them over, scaled as it is."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: Any, *parameters: Any) -> torch.Tensor:
        """Return the loss, which depends on `parameters`."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Any) -> Any:
        """Return the gradients of the parameters."""
        gradients, ctx.gradients = ctx.gradients, ()
        return None, None, *(None if g is None else g.mul_(scale) for g in gradients)
