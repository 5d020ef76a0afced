"""The plain model's step in three variants, with which a pipelined step is compared.

1. `full_batch`: the model as its owner would run it, on the whole minibatch.
2. `by_microbatch`: cell by cell, microbatch by microbatch, with the pipeline's random numbers
   and the losses weighted by samples. A pipelined step must always equal it, up to round-off.
3. `proof`: the whole minibatch, but the cells that draw random numbers, normalise by batch
   statistics or change buffers in forward, and only these, run by microbatch. If 1 differs from
   the pipeline and 3 does not, exactly those cells are the reason.
None of them uses the executor or its stages.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.batch.join import join
from stagewise.batch.markers import unmarked
from stagewise.batch.split import split
from stagewise.batch.values import take_apart
from stagewise.checker.pooled_statistics import pooled_statistics
from stagewise.checker.run_cells import CellRunner
from stagewise.checker.subject import Model, Subject, sum_of, weighted
from stagewise.checker.traits import (
    Splits,
    Traits,
    Unsplittable,
    buffers_of,
    named,
    shapes_of,
    uses_batch_statistics,
)
from stagewise.engine.stage.draws import Draws
from stagewise.engine.stage.keywords import invoke
from stagewise.engine.stage.randomness import CellRandomness, default_generator, generators_kept
from stagewise.errors import BatchError
from stagewise.model.added_losses import collect_losses
from stagewise.model.captured import captured_of
from stagewise.model.cell import Chain
from stagewise.model.chain import chain_of, module_tree

Tensors = dict[str, Tensor | None]  # by quantity


def full_batch(subject: Subject) -> Tensors:
    """Return reference 1."""
    model = subject.fresh_model()
    inputs, target, keywords = subject.fresh_call()
    with generators_kept([subject.device]):
        default_generator(subject.device).manual_seed(subject.seed)
        with collect_losses() as added:
            value = run_plain(model, inputs, keywords)
            loss = subject.loss_of(value, *given(target))
    seen = subject.entering(inputs, keywords)
    return finish(subject, whole_of(model), seen, sum_of([loss, *added.values()]))


def by_microbatch(subject: Subject, sizes: Sequence[int]) -> tuple[Tensors, Traits, Tensors]:
    """Return reference 2, its cells' traits, and BatchNorm's buffers for the whole minibatch."""
    chain, traits = chain_of(subject.fresh_model()), Traits()
    inputs, target, keywords = subject.fresh_batch()
    walk = CellRunner(chain, inputs)
    targets = [()] * len(sizes) if target is None else [(t,) for t in split(target, sizes)]
    shares, parts = subject.shares(targets, sizes), list[Tensor]()
    traits.normalises = {cell.index: named(cell) for cell in chain if uses_batch_statistics(cell)}
    with (
        seeded_as_pipeline(subject, chain) as randomness,
        pooled_statistics(module_tree(chain), len(sizes)) as pooled,
    ):
        for m, (part, named_parts) in enumerate(split_both(inputs, keywords, sizes)):
            # A copy: changing one part in place would mark all parts as changed.
            value = pytree.tree_map_only(Tensor, torch.clone, part)
            with collect_losses() as added:
                for cell in chain:
                    before = buffers_of(cell)
                    randomness.enter_cell(cell.index, m)
                    with noting_draws(
                        subject, randomness.draws, cell.index, named(cell), traits.draws
                    ):
                        value = walk.run(cell, value, named_parts)
                    if not all(map(torch.equal, before, buffers_of(cell))):
                        traits.changes[cell.index] = named(cell)
                if any(column[m] for column in shares.values()):
                    randomness.enter_loss(m)
                    drawn: dict[int, str] = {}
                    with noting_draws(subject, randomness.draws, 0, "", drawn):
                        losses = subject.losses_of(value, *targets[m])
                    traits.loss_draws |= bool(drawn)
                    parts += weighted(losses, shares, m)
            parts += [loss.reshape(()) * (sizes[m] / sum(sizes)) for loss in added.values()]
    tensors = finish(subject, module_tree(chain), (inputs, keywords), sum_of(parts))
    traits.splits = {mode: _splits(subject, sizes, training=mode) for mode in (True, False)}
    return tensors, traits, {f"buffer {name}": value for name, value in pooled().items()}


def outputs_by_microbatch(subject: Subject, sizes: Sequence[int]) -> object:
    """Return eval-mode outputs as `Pipeline.predict` does; raise BatchError if not per sample."""
    chain = chain_of(subject.fresh_model())
    module_tree(chain).eval()
    inputs, _, keywords = subject.fresh_batch()
    walk = CellRunner(chain, inputs)
    values = []
    with seeded_as_pipeline(subject, chain) as randomness, torch.no_grad():
        for m, (value, named_parts) in enumerate(split_both(inputs, keywords, sizes)):
            for cell in chain:
                randomness.enter_cell(cell.index, m)
                value = walk.run(cell, value, named_parts)
            values.append(value)
    return join(values, sizes, subject.batch_dim)


def outputs_of_full_batch(subject: Subject) -> object:
    """Return the outputs in eval mode."""
    model = subject.fresh_model()
    whole_of(model).eval()
    inputs, _, keywords = subject.fresh_call()
    with generators_kept([subject.device]), torch.no_grad():
        default_generator(subject.device).manual_seed(subject.seed)
        return run_plain(model, inputs, keywords)


def whole_of(model: Model) -> nn.Module:
    """Return the plain model: the captured module itself, or all cells under their names."""
    if isinstance(model, nn.Module) and captured_of(model) is not None:
        return model
    return module_tree(chain_of(model))


def run_plain(model: Model, inputs: object, keywords: Mapping[str, object]) -> object:
    """Call the model as its owner does, if possible without its cells."""
    value = entered(inputs)
    if isinstance(model, nn.Module) and captured_of(model) is not None:
        named = {name: entered(part) for name, part in keywords.items()}
        return model(*(() if inputs is None else (value,)), **named)
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList) and not keywords:
        return invoke(model, value, {})
    chain = chain_of(model)  # a Sequential accepts no keywords
    walk = CellRunner(chain, inputs)
    for cell in chain:
        value = walk.run(cell, value, keywords)
    return value


def after_optimizer(
    subject: Subject, gradients: Mapping[str, Tensor | None], norm: Tensor | None
) -> dict[str, Tensor]:
    """Return the plain model's parameters after one update from given gradients, by name.

    Gradients are clipped first if `norm`, that of the whole model, is given.
    """
    named = dict(whole_of(subject.fresh_model()).named_parameters())
    own = {name: named[name] for name in gradients}
    for name, parameter in own.items():
        parameter.grad = gradients[name]
    if subject.max_value is not None:
        nn.utils.clip_grad_value_(own.values(), subject.max_value)
    if norm is not None and subject.max_norm is not None:
        nn.utils.clip_grads_with_norm_(own.values(), subject.max_norm, norm)
    return updated(subject, own)


def updated(subject: Subject, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return `named` after one step of the subject's optimizer."""
    if subject.optimizer is not None and named:  # torch does not accept an empty list
        subject.optimizer(list(named.values())).step()
    return {name: parameter.detach() for name, parameter in named.items()}


def collected(
    loss: Tensor,
    inputs: object,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    named_buffers: Iterable[tuple[str, Tensor]],
) -> Tensors:
    """Return the results of a step by quantity, except parameters."""
    tensors: Tensors = {"loss": loss.detach().reshape(())}
    for index, tensor in enumerate(take_apart(inputs)[0]):
        if tensor.requires_grad:
            tensors[f"input gradient {index}"] = tensor.grad
    for name, parameter in named_parameters:
        grad = parameter.grad
        dense = grad.to_dense() if grad is not None and grad.is_sparse else grad
        tensors[f"gradient {name}"] = None if dense is None else dense.detach().clone()
    tensors.update((f"buffer {name}", b.detach().clone()) for name, b in named_buffers)
    return tensors


def finish(subject: Subject, tree: nn.Module, inputs: object, loss: Tensor) -> Tensors:
    """Run backward and the optimizer's step; `tree` has all parameters and buffers."""
    if loss.requires_grad:
        torch.autograd.backward(loss)
    tensors = collected(loss, inputs, tree.named_parameters(), tree.named_buffers())
    if subject.max_value is not None:
        nn.utils.clip_grad_value_(tree.parameters(), subject.max_value)
    if subject.max_norm is not None:
        nn.utils.clip_grad_norm_(tree.parameters(), subject.max_norm)
    new = updated(subject, dict(tree.named_parameters()))
    tensors.update((f"parameter {name}", value) for name, value in new.items())
    return tensors


def _splits(subject: Subject, sizes: Sequence[int], *, training: bool) -> Splits:
    """Record the cells' splits, in the model's mode if `training`, otherwise in eval mode."""
    splits, chain = Splits(), chain_of(subject.fresh_model())
    if not training:
        module_tree(chain).eval()
    whole, _, keywords = subject.fresh_batch()
    walk = CellRunner(chain, whole)
    with (
        seeded_as_pipeline(subject, chain) as randomness,
        torch.set_grad_enabled(training),
        collect_losses(),
    ):
        for m, (part, named_parts) in enumerate(split_both(whole, keywords, sizes)):
            value = pytree.tree_map_only(Tensor, torch.clone, part)
            for cell in chain:
                splits.parts.setdefault(cell.index, []).append(shapes_of(value))
                randomness.enter_cell(cell.index, m)
                value = walk.run(cell, value, named_parts)
        value = entered(whole)
        for cell in chain:
            value = walk.run(cell, value, keywords)
            splits.wholes[cell.index] = shapes_of(value)
    return splits


@contextmanager
def seeded_as_pipeline(subject: Subject, chain: Chain = ()) -> Iterator[CellRandomness]:
    """Use the pipeline's random numbers, also in generators held by `chain`; restore the caller's
    afterwards."""
    draws = Draws([*(cell.module for cell in chain), subject.loss])
    with generators_kept([subject.device]), draws.kept(watch=True):
        yield CellRandomness(subject.seed, 0, subject.device, draws)


@contextmanager
def noting_draws(
    subject: Subject, draws: Draws | None, key: int, name: str, into: dict[int, str]
) -> Iterator[None]:
    """Put `name` under `key` if the body draws random numbers, from any generator."""
    generator = default_generator(subject.device)
    before = generator.get_state()
    yield
    moved = draws is not None and draws.look()
    if moved or not torch.equal(before, generator.get_state()):
        into[key] = name


def split_both(
    inputs: object, keywords: Mapping[str, object], sizes: Sequence[int]
) -> Iterator[tuple[object, dict[str, object]]]:
    """Yield inputs and keyword arguments by microbatch."""
    columns = {name: split(value, sizes) for name, value in keywords.items()}
    for m, part in enumerate(split(inputs, sizes)):
        yield part, {name: column[m] for name, column in columns.items()}


def entered(inputs: object) -> object:
    """Return the first cell's input, unmarked; leaves that require gradients are copied."""
    plain = unmarked(inputs)
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, plain)


def given(target: object) -> tuple[object, ...]:
    """Return the arguments that a loss gets in addition to the output."""
    return () if target is None else (unmarked(target),)


def outputs_or_none(run: Callable[[], object]) -> Tensors:
    """Return the result of `run` by quantity; nothing if it is not one output per sample."""
    try:
        tensors = take_apart(run())[0]
    except (BatchError, Unsplittable):
        return {}
    if len(tensors) == 1:
        return {"outputs": tensors[0].detach()}
    return {f"outputs {index}": tensor.detach() for index, tensor in enumerate(tensors)}
