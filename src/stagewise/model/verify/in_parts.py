"""Call cells one after another as stages do: a backward inside forward stops at its stage's inputs.

A stage's inputs are leaves of its own graph. Called one after another in one process, cells share
one graph, and a torch.autograd.grad in forward would reach tensors that it cannot in a pipeline. So
while forward runs, no gradient passes from a cell to the previous one; afterwards all do.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.model.captured import Captured


class _Forward:
    """One call of all cells, and whether it is still running."""

    runs = True

    def joint(self, module: nn.Module, args: object, output: object) -> object:
        """Return a cell's output with blocked gradients, for the next cell."""
        apply: Any = _Joint.apply
        return pytree.tree_map_only(
            torch.Tensor, lambda t: apply(t, self) if t.requires_grad else t, output
        )


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, call: _Forward) -> torch.Tensor:
        ctx.call = call
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return (None if ctx.call.runs else gradient), None


@contextmanager
def in_parts(captured: Captured) -> Iterator[None]:
    """Separate the cells of `captured` in a call inside."""
    call = _Forward()
    with ExitStack() as hooks:
        for cell in captured.chain[:-1]:
            hooks.callback(cell.module.register_forward_hook(call.joint).remove)
        try:
            yield
        finally:
            call.runs = False
