"""Find the first cell, or the loss, that gives a different result by microbatch, and why."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stagewise.batch.markers import unmarked
from stagewise.batch.values import take_apart
from stagewise.checker.constant_draws import ConstantDraws, TooManyDraws
from stagewise.checker.proof import Minibatch
from stagewise.checker.subject import Subject
from stagewise.checker.traits import Traits, Unsplittable, buffers_of, named, uses_batch_statistics
from stagewise.engine.stage.draws import Draws
from stagewise.model.added_losses import collect_losses
from stagewise.model.cell import Cell


def culprit(
    subject: Subject, sizes: Sequence[int], traits: Traits, tolerance: float, *, training: bool
) -> str | None:
    """Return the first cell, or the loss, that differs by microbatch; None if none does.

    In eval mode, which determines the outputs, unless `training`.
    """
    batch = Minibatch(subject, sizes, traits, training=training)
    unsplittable: str | None = None
    with batch.seeded(), torch.no_grad():
        value = unmarked(batch.inputs)
        for cell in batch.chain:
            try:
                parts = batch.by_parts(_twin(cell), value)
            except Unsplittable:
                unsplittable = (
                    unsplittable or f"cell {named(cell)}, whose values cannot be split by samples"
                )
                value = batch.run(cell, value)
                continue
            if cell.index in traits.cells:
                value = parts
                continue
            value = batch.run(cell, value)
            pairs = zip(take_apart(value)[0], take_apart(parts)[0], strict=True)
            if not all(_near(whole, part, tolerance) for whole, part in pairs):
                return f"cell {named(cell)}, whose output depends on how the batch is split"
        if unsplittable or not training or subject.loss is None or traits.loss_draws:
            return unsplittable
        return _no_mean(batch, value, tolerance)


def mixing(subject: Subject, sizes: Sequence[int], traits: Traits, tolerance: float) -> str | None:
    """Return the first cell, or the loss, that is wrongly excused: it differs by microbatch even in
    eval mode with constant random numbers, without batch statistics and buffer changes. None if
    there is none, or if this cannot be determined."""
    batch = Minibatch(subject, sizes, traits, training=False)
    try:
        return _mixing(batch, tolerance)
    except (Unsplittable, TooManyDraws):
        return None


def _mixing(batch: Minibatch, tolerance: float) -> str | None:
    subject, traits = batch.subject, batch.traits
    value = unmarked(batch.inputs)
    with batch.seeded(), torch.no_grad(), ConstantDraws(subject.device):
        for cell in batch.chain:
            twin = _twin(cell)
            before = buffers_of(twin)
            drawn_from = Draws([twin.module]).kept(guard=True, undo=True)
            with drawn_from as moved, collect_losses() as added:
                whole = batch.run(twin, value)
            if moved:
                value = whole  # draws from other generators than torch's cannot be held constant
                continue
            changes = not all(map(torch.equal, before, buffers_of(twin)))
            if cell.index in traits.cells and not changes and not uses_batch_statistics(cell):
                with collect_losses() as added_by_parts:
                    parts = batch.by_parts(_twin(cell), value)
                pairs = [
                    *zip(take_apart(whole)[0], take_apart(parts)[0], strict=True),
                    *((loss, added_by_parts[name]) for name, loss in added.items()),
                ]
                if not all(_near(one, other, tolerance) for one, other in pairs):
                    return f"cell {named(cell)}, which mixes samples even in eval mode"
            value = whole
        if traits.loss_draws and subject.loss is not None:
            return _no_mean(batch, value, tolerance)
    return None


def _twin(cell: Cell) -> Cell:
    return replace(cell, module=copy.deepcopy(cell.module))


def _no_mean(batch: Minibatch, output: object, tolerance: float) -> str | None:
    """Return what is wrong with the loss if it is not a mean over samples, or None."""
    whole = batch.loss(output)
    try:
        parts = batch.loss_by_parts(output)
    except Unsplittable:
        return "the loss, whose argument cannot be split by samples"
    if _near(whole, parts, tolerance) or not whole.isfinite():
        return None
    constant = ", with its random numbers held constant," if batch.traits.loss_draws else ","
    weigher = "samples" if batch.subject.weight is None else "weight(target)"
    kind = "samples" if batch.subject.weight is None else "what weight(target) counts"
    return (
        f"the loss{constant} {float(whole):.6g} on the batch but {float(parts):.6g} as the mean "
        f"over microbatches, weighted by {weigher}: it must be a mean over {kind}"
    )


def _near(whole: Tensor, part: Tensor, tolerance: float) -> bool:
    if whole.shape != part.shape or not whole.is_floating_point():
        return whole.shape == part.shape and torch.equal(whole, part)
    return (
        bool((whole - part).abs().max() <= tolerance * whole.abs().max())
        if len(whole.reshape(-1))
        else True
    )
