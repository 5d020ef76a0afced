"""The plain model's step, three ways: what a pipelined step is compared with.

1. `full_batch`: the model as its owner would run it, on the whole minibatch.
2. `by_microbatch`: cell by cell, microbatch by microbatch, with the pipeline's random numbers
   and the losses weighted by samples. A pipelined step must equal it to round-off, always.
3. `proof`: the whole minibatch, but the cells that draw random numbers, normalise by batch
   statistics or change buffers in forward run by microbatch, and nothing else. Where 1 differs
   from the pipeline and 3 does not, exactly those cells are the reason.

Nothing here runs the executor or its stages.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from stagewise.engine.keywords import invoke
from stagewise.engine.losses import add_loss, collect_losses
from stagewise.engine.microbatch import join, split
from stagewise.engine.randomness import CellRandomness, default_generator, generators_kept
from stagewise.engine.values import put_together, take_apart
from stagewise.model.chain import Cell, Chain, chain_of, module_tree
from stagewise.pipeline.checker.statistics import pooled_statistics
from stagewise.pipeline.checker.subject import Subject, sum_of, weighted
from stagewise.pipeline.checker.walk import Walk

Tensors = dict[str, Tensor | None]  # by quantity
Shapes = list[torch.Size]


class Unsplittable(Exception):
    """A boundary's tensors cannot be told apart by samples, so nothing can be proved."""


@dataclass
class Traits:
    """What reference 2 saw: why the full batch may differ, and how cells' inputs are split."""

    draws: dict[int, str] = field(default_factory=dict)  # cell index -> name
    normalises: dict[int, str] = field(default_factory=dict)
    changes: dict[int, str] = field(default_factory=dict)
    loss_draws: bool = False
    # By cell index: its inputs' shapes in every microbatch, its outputs' in the whole minibatch.
    parts: dict[int, list[Shapes]] = field(default_factory=dict)
    wholes: dict[int, Shapes] = field(default_factory=dict)

    @property
    def cells(self) -> set[int]:
        """The cells that mathematics lets differ between microbatches and the full batch."""
        return {*self.draws, *self.normalises, *self.changes}

    def reason(self) -> str:
        """Why the full batch differs, for people; empty where nothing explains it."""
        changes = {i: n for i, n in self.changes.items() if i not in self.normalises}
        draws = [*self.draws.values(), *(["the loss"] if self.loss_draws else [])]
        clauses = (
            ("BatchNorm's statistics by microbatch", self.normalises.values()),
            ("random numbers", draws),
            ("buffers that every forward changes", changes.values()),
        )
        return ", ".join(f"{what} ({', '.join(names)})" for what, names in clauses if names)


def full_batch(subject: Subject) -> Tensors:
    """Reference 1."""
    model = subject.fresh_model()
    chain = chain_of(model)
    walk = Walk(chain)
    inputs, target = subject.fresh_batch()
    with generators_kept([subject.device]):
        default_generator(subject.device).manual_seed(subject.seed)
        value = _entered(inputs)
        with collect_losses() as added:
            if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
                value = invoke(model, value, {})
            else:
                for cell in chain:
                    value = walk.run(cell, value)
            loss = subject.loss_of(value, *_given(target))
    return _finish(subject, chain, inputs, sum_of([loss, *added.values()]))


def by_microbatch(subject: Subject, sizes: Sequence[int]) -> tuple[Tensors, Traits, Tensors]:
    """Reference 2, what its cells did, and BatchNorm's buffers had it seen the whole minibatch."""
    chain, traits = chain_of(subject.fresh_model()), Traits()
    walk = Walk(chain)
    inputs, target = subject.fresh_batch()
    targets = [()] * len(sizes) if target is None else [(t,) for t in split(target, sizes)]
    shares, parts = subject.shares(targets, sizes), list[Tensor]()
    traits.normalises = {cell.index: _named(cell) for cell in chain if _uses_batch_statistics(cell)}
    with (
        _randomness(subject) as randomness,
        pooled_statistics(module_tree(chain), len(sizes)) as pooled,
    ):
        for m, part in enumerate(split(inputs, sizes)):
            # A copy of its own: a cell may change it in place, which would mark all parts changed.
            value = pytree.tree_map_only(Tensor, torch.clone, part)
            with collect_losses() as added:
                for cell in chain:
                    traits.parts.setdefault(cell.index, []).append(_shapes(value))
                    before = _state_of(cell)
                    randomness.enter_cell(cell.index, m)
                    with _noting_draws(subject, cell.index, _named(cell), traits.draws):
                        value = walk.run(cell, value)
                    if not all(map(torch.equal, before, _state_of(cell))):
                        traits.changes[cell.index] = _named(cell)
                if any(column[m] for column in shares.values()):
                    randomness.enter_loss(m)
                    drawn: dict[int, str] = {}
                    with _noting_draws(subject, 0, "", drawn):
                        losses = subject.losses_of(value, *targets[m])
                    traits.loss_draws |= bool(drawn)
                    parts += weighted(losses, shares, m)
            parts += [loss.reshape(()) * (sizes[m] / sum(sizes)) for loss in added.values()]
    tensors = _finish(subject, chain, inputs, sum_of(parts))
    traits.wholes = _output_shapes(subject)
    return tensors, traits, {f"buffer {name}": value for name, value in pooled().items()}


def proof(subject: Subject, sizes: Sequence[int], traits: Traits) -> tuple[Tensors, Tensors]:
    """Reference 3, and BatchNorm's buffers had it seen the whole minibatch.

    Raises Unsplittable where a value cannot be split by samples.
    """
    chain = chain_of(subject.fresh_model())
    walk = Walk(chain)
    inputs, target = subject.fresh_batch()
    with (
        _randomness(subject) as randomness,
        pooled_statistics(module_tree(chain), len(sizes)) as pooled,
    ):
        value = _entered(inputs)
        with collect_losses() as added:
            for cell in chain:
                if cell.index in traits.cells:
                    is_loss = subject.loss is None and cell.index == len(chain) - 1
                    value = _by_parts(walk, cell, value, sizes, traits, randomness, is_loss=is_loss)
                else:
                    value = walk.run(cell, value)
            loss = _whole_loss(subject, value, target, sizes, traits, randomness)
    tensors = _finish(subject, chain, inputs, sum_of([loss, *added.values()]))
    return tensors, {f"buffer {name}": value for name, value in pooled().items()}


def culprit(
    subject: Subject, sizes: Sequence[int], traits: Traits, tolerance: float, *, training: bool
) -> str | None:
    """The first cell, or the loss, that gives something else by microbatch; None if none does.

    In eval mode, which decides the outputs, unless `training`.
    """
    chain = chain_of(subject.fresh_model())
    walk = Walk(chain)
    if not training:
        module_tree(chain).eval()
    inputs, target = subject.fresh_batch()
    unsplittable: str | None = None
    with _randomness(subject) as randomness, torch.no_grad():
        value = inputs
        for cell in chain:
            is_loss = subject.loss is None and cell.index == len(chain) - 1
            twin = replace(cell, module=copy.deepcopy(cell.module))
            try:
                parts = _by_parts(walk, twin, value, sizes, traits, randomness, is_loss=is_loss)
            except Unsplittable:
                unsplittable = (
                    unsplittable or f"cell {_named(cell)}, whose values cannot be split by samples"
                )
                value = walk.run(cell, value)
                continue
            if cell.index in traits.cells:
                value = parts
                continue
            value = walk.run(cell, value)
            pairs = zip(take_apart(value)[0], take_apart(parts)[0], strict=True)
            if not all(_near(whole, part, tolerance) for whole, part in pairs):
                return f"cell {_named(cell)}, whose output depends on how the batch is split"
        if unsplittable or not training or subject.loss is None or traits.loss_draws:
            return unsplittable
        whole = subject.loss_of(value, *_given(target))
        try:
            parts = _whole_loss(subject, value, target, sizes, traits, randomness, split_it=True)
        except Unsplittable:
            return "the loss, whose argument cannot be split by samples"
        if not _near(whole, parts, tolerance):
            return (
                f"the loss, {float(whole):.6g} on the batch but {float(parts):.6g} as the mean "
                "over microbatches, weighted by samples: it must be a mean over samples"
            )
    return None


def outputs_by_microbatch(subject: Subject, sizes: Sequence[int]) -> object:
    """The outputs in eval mode, as `Pipeline.predict` gives them; BatchError: not by sample."""
    chain = chain_of(subject.fresh_model())
    walk = Walk(chain)
    module_tree(chain).eval()
    inputs, _ = subject.fresh_batch()
    values = []
    with _randomness(subject) as randomness, torch.no_grad():
        for m, value in enumerate(split(inputs, sizes)):
            for cell in chain:
                randomness.enter_cell(cell.index, m)
                value = walk.run(cell, value)
            values.append(value)
    return join(values, sizes)


def outputs_of_full_batch(subject: Subject) -> object:
    """The outputs in eval mode."""
    chain = chain_of(subject.fresh_model())
    walk = Walk(chain)
    module_tree(chain).eval()
    value, _ = subject.fresh_batch()
    with generators_kept([subject.device]), torch.no_grad():
        default_generator(subject.device).manual_seed(subject.seed)
        for cell in chain:
            value = walk.run(cell, value)
    return value


def outputs_for_proof(subject: Subject, sizes: Sequence[int], traits: Traits) -> object:
    """The outputs in eval mode, run as for reference 3."""
    chain = chain_of(subject.fresh_model())
    walk = Walk(chain)
    module_tree(chain).eval()
    value, _ = subject.fresh_batch()
    with _randomness(subject) as randomness, torch.no_grad():
        for cell in chain:
            if cell.index in traits.cells:
                value = _by_parts(walk, cell, value, sizes, traits, randomness, is_loss=False)
            else:
                value = walk.run(cell, value)
    return value


def after_optimizer(subject: Subject, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The plain model's parameters after one update from given gradients, by name."""
    named = dict(module_tree(chain_of(subject.fresh_model())).named_parameters())
    own = {name: named[name] for name in gradients}
    for name, parameter in own.items():
        parameter.grad = gradients[name]
    return updated(subject, own)


def updated(subject: Subject, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`named` after one step of the subject's optimizer."""
    if subject.optimizer is not None and named:  # torch refuses an empty list
        subject.optimizer(list(named.values())).step()
    return {name: parameter.detach() for name, parameter in named.items()}


def collected(
    loss: Tensor,
    inputs: object,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    named_buffers: Iterable[tuple[str, Tensor]],
) -> Tensors:
    """What a step leaves behind, by quantity, but for parameters."""
    tensors: Tensors = {"loss": loss.detach().reshape(())}
    for index, tensor in enumerate(take_apart(inputs)[0]):
        if tensor.requires_grad:
            tensors[f"input gradient {index}"] = tensor.grad
    for name, parameter in named_parameters:
        grad = parameter.grad
        tensors[f"gradient {name}"] = None if grad is None else grad.detach().clone()
    tensors.update((f"buffer {name}", b.detach().clone()) for name, b in named_buffers)
    return tensors


def _finish(subject: Subject, chain: Chain, inputs: object, loss: Tensor) -> Tensors:
    """Backward and the optimizer's step."""
    tree = module_tree(chain)
    if loss.requires_grad:
        torch.autograd.backward(loss)
    tensors = collected(loss, inputs, tree.named_parameters(), tree.named_buffers())
    new = updated(subject, dict(tree.named_parameters()))
    tensors.update((f"parameter {name}", value) for name, value in new.items())
    return tensors


def _by_parts(
    walk: Walk,
    cell: Cell,
    value: object,
    sizes: Sequence[int],
    traits: Traits,
    randomness: CellRandomness,
    *,
    is_loss: bool,
) -> object:
    """Run `cell` on the microbatches of `value`, and put its outputs together."""
    outputs: list[Any] = []
    for m, part in enumerate(_split_as(value, traits.parts[cell.index])):
        randomness.enter_cell(cell.index, m)
        with collect_losses() as added:
            outputs.append(walk.run(cell, part))
        for name, loss in added.items():
            add_loss(loss * (sizes[m] / sum(sizes)), name)
    if is_loss:
        weighted = [o * (size / sum(sizes)) for o, size in zip(outputs, sizes, strict=True)]
        return torch.stack(weighted).sum(0)
    flat = [take_apart(output) for output in outputs]
    columns = list(zip(*(tensors for tensors, _ in flat), strict=True))
    joined = [_joined(*pair) for pair in zip(columns, traits.wholes[cell.index], strict=True)]
    return put_together(joined, flat[0][1])


def _split_as(value: object, parts: Sequence[Shapes]) -> Iterator[object]:
    """`value` by microbatch; what was no part of the batch in reference 2 is not split here."""
    tensors, structure = take_apart(value)
    if any(len(shapes) != len(tensors) for shapes in parts):
        raise Unsplittable
    columns: list[Sequence[Tensor]] = []
    for tensor, shapes in zip(tensors, zip(*parts, strict=True), strict=True):
        if all(shape == tensor.shape for shape in shapes):
            columns.append([tensor] * len(parts))
        else:
            axis = _axis_of_samples(shapes, tensor.shape)
            pieces = torch.split(tensor, [shape[axis] for shape in shapes], axis)
            columns.append([piece.clone() for piece in pieces])  # a cell may change it in place
    return (put_together([c[m] for c in columns], structure) for m in range(len(parts)))


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
        return subject.loss_of(output, *_given(target))
    parts: list[Tensor] = []
    try:
        outputs = split(output, sizes)
    except RuntimeError:
        raise Unsplittable from None
    targets = [()] * len(sizes) if target is None else [(t,) for t in split(target, sizes)]
    shares = subject.shares(targets, sizes)
    for m in range(len(sizes)):
        randomness.enter_loss(m)
        parts += weighted(subject.losses_of(outputs[m], *targets[m]), shares, m)
    return sum_of(parts)


def _output_shapes(subject: Subject) -> dict[int, Shapes]:
    value, _ = subject.fresh_batch()
    chain = chain_of(subject.fresh_model())
    walk = Walk(chain)
    shapes = {}
    with _randomness(subject), torch.no_grad():
        for cell in chain:
            value = walk.run(cell, value)
            shapes[cell.index] = _shapes(value)
    return shapes


@contextmanager
def _randomness(subject: Subject) -> Iterator[CellRandomness]:
    with generators_kept([subject.device]):
        yield CellRandomness(subject.seed, 0, subject.device)


@contextmanager
def _noting_draws(subject: Subject, key: int, name: str, into: dict[int, str]) -> Iterator[None]:
    generator = default_generator(subject.device)
    before = generator.get_state()
    yield
    if not torch.equal(before, generator.get_state()):
        into[key] = name


def _entered(inputs: object) -> object:
    """What the first cell is fed: a copy where a leaf could not be changed in place."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, inputs)


def _given(target: object) -> tuple[object, ...]:
    return () if target is None else (target,)


def _state_of(cell: Cell) -> list[Tensor]:
    return [buffer.detach().clone() for buffer in cell.module.buffers()]


def _uses_batch_statistics(cell: Cell) -> bool:
    norms = [module for module in cell.module.modules() if isinstance(module, _BatchNorm)]
    return any(norm.training or norm.running_mean is None for norm in norms)


def _shapes(value: object) -> Shapes:
    return [tensor.shape for tensor in take_apart(value)[0]]


def _named(cell: Cell) -> str:
    return f"{cell.name} {type(cell.module).__name__}"


def _near(whole: Tensor, part: Tensor, tolerance: float) -> bool:
    if whole.shape != part.shape or not whole.is_floating_point():
        return whole.shape == part.shape and torch.equal(whole, part)
    return (
        bool((whole - part).abs().max() <= tolerance * whole.abs().max())
        if len(whole.reshape(-1))
        else True
    )
