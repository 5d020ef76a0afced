"""Reference 3 (the minibatch whole, but some cells by microbatch), and the search for a culprit."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagewise.batch.markers import along, unmarked
from stagewise.batch.split import split
from stagewise.batch.values import put_together, take_apart
from stagewise.checker.constant_draws import ConstantDraws, TooManyDraws
from stagewise.checker.pooled_statistics import pooled_statistics
from stagewise.checker.references import (
    Shapes,
    Splits,
    Tensors,
    Traits,
    entered,
    finish,
    given,
    named,
    seeded,
    split_both,
    state_of,
    uses_batch_statistics,
)
from stagewise.checker.run_cells import Walk
from stagewise.checker.subject import Subject, sum_of, weighted
from stagewise.engine.stage.draws import Draws
from stagewise.engine.stage.randomness import CellRandomness
from stagewise.engine.step.first_look import FirstLook
from stagewise.model.added_losses import LossCollector, add_loss, collect_losses, collecting
from stagewise.model.cell import Cell
from stagewise.model.chain import chain_of, module_tree


class Unsplittable(Exception):
    """A boundary's tensors cannot be told apart by samples, so nothing can be proved."""


def proof(subject: Subject, sizes: Sequence[int], traits: Traits) -> tuple[Tensors, Tensors]:
    """Reference 3, and BatchNorm's buffers had it seen the whole minibatch.

    Raises Unsplittable where a value cannot be split by samples.
    """
    chain, splits = chain_of(subject.fresh_model()), traits.splits[True]
    inputs, target, keywords = subject.fresh_batch()
    walk = Walk(chain, inputs)
    with (
        seeded(subject, chain) as randomness,
        pooled_statistics(module_tree(chain), len(sizes)) as pooled,
    ):
        value = entered(inputs)
        with collect_losses() as added:
            for cell in chain:
                if cell.index in traits.cells:
                    is_loss = subject.loss is None and cell.index == len(chain) - 1
                    value = _by_parts(
                        walk, cell, value, keywords, sizes, splits, randomness, is_loss=is_loss
                    )
                else:
                    value = walk.run(cell, value, keywords)
            loss = _whole_loss(subject, value, target, sizes, traits, randomness)
    tensors = finish(
        subject, module_tree(chain), (inputs, keywords), sum_of([loss, *added.values()])
    )
    return tensors, {f"buffer {name}": value for name, value in pooled().items()}


def culprit(
    subject: Subject, sizes: Sequence[int], traits: Traits, tolerance: float, *, training: bool
) -> str | None:
    """The first cell, or the loss, that gives something else by microbatch; None if none does.

    In eval mode, which decides the outputs, unless `training`.
    """
    chain, splits = chain_of(subject.fresh_model()), traits.splits[training]
    if not training:
        module_tree(chain).eval()
    inputs, target, keywords = subject.fresh_batch()
    walk = Walk(chain, inputs)
    unsplittable: str | None = None
    with seeded(subject, chain) as randomness, torch.no_grad():
        value = unmarked(inputs)
        for cell in chain:
            is_loss = subject.loss is None and cell.index == len(chain) - 1
            twin = replace(cell, module=copy.deepcopy(cell.module))
            try:
                parts = _by_parts(
                    walk, twin, value, keywords, sizes, splits, randomness, is_loss=is_loss
                )
            except Unsplittable:
                unsplittable = (
                    unsplittable or f"cell {named(cell)}, whose values cannot be split by samples"
                )
                value = walk.run(cell, value, keywords)
                continue
            if cell.index in traits.cells:
                value = parts
                continue
            value = walk.run(cell, value, keywords)
            pairs = zip(take_apart(value)[0], take_apart(parts)[0], strict=True)
            if not all(_near(whole, part, tolerance) for whole, part in pairs):
                return f"cell {named(cell)}, whose output depends on how the batch is split"
        if unsplittable or not training or subject.loss is None or traits.loss_draws:
            return unsplittable
        return _no_mean(subject, value, target, sizes, traits, randomness, tolerance)


def mixing(subject: Subject, sizes: Sequence[int], traits: Traits, tolerance: float) -> str | None:
    """The first cell, or the loss, that is excused but should not be: in eval mode, with its random
    numbers held constant, where it normalises by no batch and changes no buffer, it still gives
    something else by microbatch. None, too, where that cannot be found out."""
    try:
        return _mixing(subject, sizes, traits, tolerance)
    except (Unsplittable, TooManyDraws):
        return None


def _mixing(subject: Subject, sizes: Sequence[int], traits: Traits, tolerance: float) -> str | None:
    chain, splits = chain_of(subject.fresh_model()), traits.splits[False]
    module_tree(chain).eval()
    inputs, target, keywords = subject.fresh_batch()
    walk, value = Walk(chain, inputs), unmarked(inputs)
    with seeded(subject, chain) as randomness, torch.no_grad(), ConstantDraws(subject.device):
        for cell in chain:
            is_loss = subject.loss is None and cell.index == len(chain) - 1
            twin = replace(cell, module=copy.deepcopy(cell.module))
            before = state_of(twin)
            drawn_from = Draws([twin.module]).kept(guard=True, undo=True)
            with drawn_from as moved, collect_losses() as added:
                whole = walk.run(twin, value, keywords)
            if moved:
                value = whole  # past torch's generators, where no draw can be held constant
                continue
            changes = not all(map(torch.equal, before, state_of(twin)))
            if cell.index in traits.cells and not changes and not uses_batch_statistics(cell):
                twin = replace(cell, module=copy.deepcopy(cell.module))
                with collect_losses() as added_by_parts:
                    parts = _by_parts(
                        walk, twin, value, keywords, sizes, splits, randomness, is_loss=is_loss
                    )
                pairs = [
                    *zip(take_apart(whole)[0], take_apart(parts)[0], strict=True),
                    *((loss, added_by_parts[name]) for name, loss in added.items()),
                ]
                if not all(_near(one, other, tolerance) for one, other in pairs):
                    return f"cell {named(cell)}, which mixes samples even in eval mode"
            value = whole
        if traits.loss_draws and subject.loss is not None:
            return _no_mean(subject, value, target, sizes, traits, randomness, tolerance)
    return None


def _no_mean(
    subject: Subject,
    output: object,
    target: object,
    sizes: Sequence[int],
    traits: Traits,
    randomness: CellRandomness,
    tolerance: float,
) -> str | None:
    """What is wrong with the loss, if it is no mean over samples."""
    whole = subject.loss_of(output, *given(target))
    try:
        parts = _whole_loss(subject, output, target, sizes, traits, randomness, split_it=True)
    except Unsplittable:
        return "the loss, whose argument cannot be split by samples"
    if _near(whole, parts, tolerance) or not whole.isfinite():
        return None
    constant = ", with its random numbers held constant," if traits.loss_draws else ","
    weigher = "samples" if subject.weight is None else "weight(target)"
    kind = "samples" if subject.weight is None else "what that counts"
    return (
        f"the loss{constant} {float(whole):.6g} on the batch but {float(parts):.6g} as the mean "
        f"over microbatches, weighted by {weigher}: it must be a mean over {kind}"
    )


def causes(subject: Subject, sizes: Sequence[int]) -> list[str]:
    """What a look at the microbatches says of losses and cells that cannot be split."""
    chain = chain_of(subject.fresh_model())
    inputs, target, keywords = subject.fresh_batch()
    targets = [()] * len(sizes) if target is None else [(t,) for t in split(target, sizes)]
    walk = Walk(chain, inputs)
    look = FirstLook(
        sizes,
        subject.batch_dim,
        weight=subject.weight,
        sums_losses=subject.sums_losses,
        loss=subject.loss,
    )
    calls = [(cell, functools.partial(walk.run, cell)) for cell in chain]
    with seeded(subject, chain) as randomness, torch.no_grad():
        for m, (value, named_parts) in enumerate(split_both(inputs, keywords, sizes)):
            collector = LossCollector()
            outer = collecting(collector)
            try:
                for cell, run in look.cells(calls, collector, m, chain[-1]):
                    randomness.enter_cell(cell.index, m)
                    value = run(value, named_parts)
            finally:
                collecting(outer)
            if subject.loss is not None:
                look.loss_ran(subject.loss, m, value, targets[m])
    return [text for _, text in look.found.values()]


def outputs_for_proof(subject: Subject, sizes: Sequence[int], traits: Traits) -> object:
    """The outputs in eval mode, run as for reference 3."""
    chain, splits = chain_of(subject.fresh_model()), traits.splits[False]
    module_tree(chain).eval()
    inputs, _, keywords = subject.fresh_batch()
    walk, value = Walk(chain, inputs), unmarked(inputs)
    with seeded(subject, chain) as randomness, torch.no_grad():
        for cell in chain:
            if cell.index in traits.cells:
                value = _by_parts(
                    walk, cell, value, keywords, sizes, splits, randomness, is_loss=False
                )
            else:
                value = walk.run(cell, value, keywords)
    return value


def _by_parts(
    walk: Walk,
    cell: Cell,
    value: object,
    keywords: Mapping[str, object],
    sizes: Sequence[int],
    splits: Splits,
    randomness: CellRandomness,
    *,
    is_loss: bool,
) -> object:
    """Run `cell` on the microbatches of `value`, and put its outputs together."""
    outputs: list[Any] = []
    by_name = {name: split(part, sizes) for name, part in keywords.items()}
    for m, part in enumerate(_split_as(value, splits.parts[cell.index])):
        randomness.enter_cell(cell.index, m)
        own = {name: column[m] for name, column in by_name.items()}
        with collect_losses() as added:
            outputs.append(walk.run(cell, part, own))
        for name, loss in added.items():
            add_loss(loss * (sizes[m] / sum(sizes)), name)
    if is_loss:
        weighted = [o * (size / sum(sizes)) for o, size in zip(outputs, sizes, strict=True)]
        return torch.stack(weighted).sum(0)
    whole = splits.wholes[cell.index]
    tensors = [take_apart(output)[0] for output in outputs]
    if any(len(own) != len(whole.tensors) for own in tensors):
        raise Unsplittable
    columns = zip(*tensors, strict=True)
    joined = [_joined(*pair) for pair in zip(columns, whole.tensors, strict=True)]
    return put_together(joined, whole.structure)


def _split_as(value: object, parts: Sequence[Shapes]) -> Iterator[object]:
    """`value` by microbatch; what was no part of the batch in reference 2 is not split here."""
    tensors, _ = take_apart(value)
    if any(len(part.tensors) != len(tensors) for part in parts):
        raise Unsplittable
    columns: list[Sequence[Tensor]] = []
    for tensor, *shapes in zip(tensors, *(part.tensors for part in parts), strict=True):
        if all(shape == tensor.shape for shape in shapes):
            columns.append([tensor] * len(parts))
        else:
            axis = _axis_of_samples(shapes, tensor.shape)
            pieces = torch.split(tensor, [shape[axis] for shape in shapes], axis)
            columns.append([piece.clone() for piece in pieces])  # a cell may change it in place
    return (
        put_together([column[m] for column in columns], part.structure)
        for m, part in enumerate(parts)
    )


def _joined(parts: Sequence[Tensor], whole: torch.Size) -> Tensor:
    if all(part.shape == whole and torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    axis = _axis_of_samples([part.shape for part in parts], whole)
    # In the parts' order of memory, since random numbers are drawn in that order.
    order = sorted(range(len(whole)), key=lambda d: parts[0].stride(d), reverse=True)
    joined = torch.cat([part.permute(order) for part in parts], order.index(axis))
    return joined.permute([order.index(d) for d in range(len(whole))])


def _axis_of_samples(parts: Sequence[torch.Size], whole: torch.Size) -> int:
    """Along which dimension `parts` make up `whole`; raises Unsplittable if along none."""
    for axis, size in enumerate(whole):
        rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in parts}
        if (
            rest == {(*whole[:axis], *whole[axis + 1 :])}
            and sum(shape[axis] for shape in parts) == size
        ):
            return axis
    raise Unsplittable


def _whole_loss(
    subject: Subject,
    output: object,
    target: object,
    sizes: Sequence[int],
    traits: Traits,
    randomness: CellRandomness,
    *,
    split_it: bool = False,
) -> Tensor:
    if not (split_it or traits.loss_draws):
        return subject.loss_of(output, *given(target))
    parts: list[Tensor] = []
    try:
        outputs = split(along(output, subject.batch_dim), sizes)
    except (RuntimeError, IndexError):
        raise Unsplittable from None
    targets = [()] * len(sizes) if target is None else [(t,) for t in split(target, sizes)]
    shares = subject.shares(targets, sizes)
    for m in range(len(sizes)):
        randomness.enter_loss(m)
        parts += weighted(subject.losses_of(outputs[m], *targets[m]), shares, m)
    return sum_of(parts)


def _near(whole: Tensor, part: Tensor, tolerance: float) -> bool:
    if whole.shape != part.shape or not whole.is_floating_point():
        return whole.shape == part.shape and torch.equal(whole, part)
    return (
        bool((whole - part).abs().max() <= tolerance * whole.abs().max())
        if len(whole.reshape(-1))
        else True
    )
