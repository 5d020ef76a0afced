"""Find the cell that makes the first NaN or inf, on request.

Problem: a loss of NaN does not say where it began, and one step later every parameter is NaN.
Idea: check what every cell returns and passes back while it runs. The first value that is not
finite fails the instruction, so every rank hears of it with cell, microbatch and step, and the step
is undone. Infinities are looked for only where gradients are needed, since masks hold them on
purpose, and not in gradients scaled against underflow, where they are routine.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from stagewise.batch.values import Apart, tensors_of
from stagewise.engine.stage.work import CellForward, Work
from stagewise.model.cell import Cell, Chain


class Finder:
    """Checks the cells' calls and the instructions that it is put around."""

    def __init__(self) -> None:
        self._is_scaled = False  # gradients are multiplied against underflow

    def around(self, calls: Sequence[tuple[Cell, CellForward]]) -> list[tuple[Cell, CellForward]]:
        """Wrap `calls` to check what cells get, return and pass back."""
        return [(cell, partial(self._forward, cell, forward)) for cell, forward in calls]

    def run(self, action: Any, cells: Chain, m: int, received: list[Apart], work: Work) -> Any:
        """Run an instruction on microbatch m; check its loss, and the gradients of `cells`.

        These are the cells whose weight gradients it accumulates.
        """
        self._is_scaled = work.gradient_scale != 1.0
        value = action(received, work)
        for name, loss in work.record.losses.get(m, {}).items():
            if found := _found(loss, infinite=True):
                raise FloatingPointError(f"{name} is {found}, though every cell's output is finite")
        if not self._is_scaled:
            for cell in reversed(cells):
                for name, parameter in cell.module.named_parameters():
                    if found := _found(parameter.grad, infinite=True):
                        raise FloatingPointError(
                            f"{cell.in_words} made {found} in the gradient of its parameter "
                            f"{name!r}"
                        )
        return value

    def _forward(
        self, cell: Cell, forward: CellForward, value: object, keywords: Mapping[str, object]
    ) -> object:
        given = tensors_of(value)
        if cell.index == 0 and (found := _first(given)):
            raise FloatingPointError(f"the batch holds {found}")
        for tensor in given:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._check_gradient, cell))  # type: ignore[no-untyped-call]
        output = forward(value, keywords)
        if found := _first(tensors_of(output)):
            raise FloatingPointError(f"its output holds {found}, and what it was given does not")
        return output

    def _check_gradient(self, cell: Cell, gradient: torch.Tensor) -> None:
        if not self._is_scaled and (found := _found(gradient, infinite=True)):
            raise FloatingPointError(f"{cell.in_words} passed back a gradient that holds {found}")


def _first(tensors: Sequence[torch.Tensor]) -> str:
    found = (_found(tensor, infinite=tensor.requires_grad) for tensor in tensors)
    return next(filter(None, found), "")


def _found(tensor: torch.Tensor | None, *, infinite: bool) -> str:
    """Return "nan" or "inf" if `tensor` holds one, else ""."""
    if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return ""
    values = tensor.detach()
    values = values.coalesce().values() if values.is_sparse else values
    if values.isfinite().all() if infinite else not values.isnan().any():
        return ""
    return "nan" if values.isnan().any() else "inf"
