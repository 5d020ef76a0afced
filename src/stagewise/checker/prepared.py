"""Prepare the arguments of a parity check: convert the dtype, and capture the model if needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.batch.markers import Microbatches, is_mark
from stagewise.checker.subject import Model, copied
from stagewise.errors import UsageError
from stagewise.model.captured import Captured, captured_of
from stagewise.model.cell import Chain
from stagewise.model.cells_of import chain_for
from stagewise.model.chain import chain_of
from stagewise.model.replay.capture_cells import AnyForm


@dataclass(frozen=True, kw_only=True)
class PlainBatch:
    """A call of the model, and the target of its loss."""

    inputs: object
    target: object
    keywords: dict[str, object]


def prepared(
    model: Model,
    inputs: object,
    target: object,
    kwargs: Mapping[str, object] | None,
    cells: Sequence[str] | None,
    dtype: torch.dtype | None,
) -> tuple[Model, PlainBatch, Chain]:
    """Return the model (a copy if its dtype changes), the batch and the chain; see check_parity.

    Raises UsageError if the plain model is missing or cannot be called, ModelError if it cannot be
    captured.
    """
    if isinstance(model, Captured):
        raise UsageError(
            "check_parity compares with the plain model, but got its capture; pass the module "
            "itself, which remembers its capture"
        )
    leaves = pytree.tree_leaves((inputs, target, kwargs), is_leaf=is_mark)
    if any(isinstance(leaf, Microbatches) for leaf in leaves):
        raise UsageError(
            "check_parity compares with the plain model on the whole batch, but got Microbatches; "
            "give it the batch as the plain model takes it"
        )
    batch = PlainBatch(inputs=inputs, target=target, keywords=dict(kwargs or {}))
    if dtype is not None:
        cells = _named_cells(model) if cells is None else cells
        model, batch = _converted(model, batch, dtype)
    chain = chain_for(model, batch.inputs, batch.keywords, cells)
    captured = captured_of(model)
    if captured is not None and captured.form.takes("target") and target is not None:
        raise UsageError(
            f"{type(model).__name__}.forward has an argument 'target', and the check also got a "
            "target; rename forward's argument, and pass it in kwargs"
        )
    return model, batch, chain


def _converted(model: Model, batch: PlainBatch, dtype: torch.dtype) -> tuple[Model, PlainBatch]:
    """Return converted copies of the model, without its capture of another dtype, and the batch."""
    model = copied(model)
    modules = [model] if isinstance(model, nn.Module) else [c.module for c in chain_of(model)]
    for module in modules:
        module.to(dtype)
    inputs, target, keywords = pytree.tree_map_only(
        Tensor,
        lambda t: (
            t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        ),
        (batch.inputs, batch.target, batch.keywords),
    )
    return model, PlainBatch(inputs=inputs, target=target, keywords=keywords)


def _named_cells(model: Model) -> tuple[str, ...] | None:
    """Return the module names by which the model was cut, if it was cut by names."""
    captured = captured_of(model)
    form = None if captured is None else captured.form
    return form.cells if isinstance(form, AnyForm) else None
