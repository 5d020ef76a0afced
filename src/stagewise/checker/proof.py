"""Reference 3: the whole minibatch, but some cells by microbatch.

Values are split and joined by the shapes that reference 2 recorded, so no dimension is guessed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stagewise.batch.markers import along, unmarked
from stagewise.batch.split import split
from stagewise.batch.values import put_together, take_apart
from stagewise.checker.pooled_statistics import pooled_statistics
from stagewise.checker.references import Tensors, entered, finish, given, seeded_as_pipeline
from stagewise.checker.run_cells import CellRunner
from stagewise.checker.subject import Subject, sum_of, weighted
from stagewise.checker.traits import Shapes, Traits, Unsplittable
from stagewise.engine.stage.randomness import CellRandomness
from stagewise.model.added_losses import add_loss, collect_losses
from stagewise.model.cell import Cell
from stagewise.model.chain import chain_of, module_tree


class Minibatch:
    """A copy of the model and of the batch; each cell runs on the whole batch or by microbatch.

    In the model's mode if `training`, otherwise in eval mode.
    """

    def __init__(
        self, subject: Subject, sizes: Sequence[int], traits: Traits, *, training: bool
    ) -> None:
        self.subject, self.traits, self._sizes = subject, traits, sizes
        self._splits = traits.splits[training]
        self.chain = chain_of(subject.fresh_model())
        if not training:
            module_tree(self.chain).eval()
        self.inputs, target, self.keywords = subject.fresh_batch()
        self._walk = CellRunner(self.chain, self.inputs)
        self._target = given(target)
        self._targets = (
            [()] * len(sizes) if target is None else [(t,) for t in split(target, sizes)]
        )
        self._randomness: CellRandomness | None = None

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Use the pipeline's random numbers."""
        with seeded_as_pipeline(self.subject, self.chain) as self._randomness:
            yield

    def run(self, cell: Cell, value: object) -> object:
        """Run the cell on the whole minibatch."""
        return self._walk.run(cell, value, self.keywords)

    def by_parts(self, cell: Cell, value: object, *, as_output: bool = False) -> object:
        """Run the cell on the microbatches of `value` and join its outputs; may raise Unsplittable.

        If the model returns the loss, return the mean, unless `as_output`.
        """
        assert self._randomness is not None
        sizes, outputs = self._sizes, list[Any]()
        by_name = {name: split(part, sizes) for name, part in self.keywords.items()}
        for m, part in enumerate(_split_as(value, self._splits.parts[cell.index])):
            self._randomness.enter_cell(cell.index, m)
            own = {name: column[m] for name, column in by_name.items()}
            with collect_losses() as added:
                outputs.append(self._walk.run(cell, part, own))
            for name, loss in added.items():
                add_loss(loss * (sizes[m] / sum(sizes)), name)
        is_loss = self.subject.loss is None and cell.index == len(self.chain) - 1
        if is_loss and not as_output:
            means = [o * (size / sum(sizes)) for o, size in zip(outputs, sizes, strict=True)]
            return torch.stack(means).sum(0)
        whole = self._splits.wholes[cell.index]
        tensors = [take_apart(output)[0] for output in outputs]
        if any(len(own) != len(whole.tensors) for own in tensors):
            raise Unsplittable
        columns = zip(*tensors, strict=True)
        joined = [_joined(*pair) for pair in zip(columns, whole.tensors, strict=True)]
        return put_together(joined, whole.structure)

    def loss(self, output: object) -> Tensor:
        """Return the loss of the whole output."""
        return self.subject.loss_of(output, *self._target)

    def loss_by_parts(self, output: object) -> Tensor:
        """Return the weighted sum of the microbatches' losses; may raise Unsplittable."""
        assert self._randomness is not None
        subject, parts = self.subject, list[Tensor]()
        try:
            outputs = split(along(output, subject.batch_dim), self._sizes)
        except (RuntimeError, IndexError):
            raise Unsplittable from None
        shares = subject.shares(self._targets, self._sizes)
        for m, target in enumerate(self._targets):
            self._randomness.enter_loss(m)
            parts += weighted(subject.losses_of(outputs[m], *target), shares, m)
        return sum_of(parts)

    def proved(self, value: object, *, as_output: bool = False) -> object:
        """Run the chain, with the cells that explain a difference by microbatch."""
        for cell in self.chain:
            if cell.index in self.traits.cells:
                value = self.by_parts(cell, value, as_output=as_output)
            else:
                value = self.run(cell, value)
        return value


def proof(subject: Subject, sizes: Sequence[int], traits: Traits) -> tuple[Tensors, Tensors]:
    """Return reference 3, and BatchNorm's buffers as if it had seen the whole minibatch.

    Raises Unsplittable if a value cannot be split by samples.
    """
    batch = Minibatch(subject, sizes, traits, training=True)
    tree = module_tree(batch.chain)
    with (
        batch.seeded(),
        pooled_statistics(tree, len(sizes)) as pooled,
        collect_losses() as added,
    ):
        value = batch.proved(entered(batch.inputs))
        loss = batch.loss_by_parts(value) if traits.loss_draws else batch.loss(value)
    losses = sum_of([loss, *added.values()])
    tensors = finish(subject, tree, (batch.inputs, batch.keywords), losses)
    return tensors, {f"buffer {name}": value for name, value in pooled().items()}


def outputs_for_proof(subject: Subject, sizes: Sequence[int], traits: Traits) -> object:
    """Return the outputs in eval mode, run as for reference 3."""
    batch = Minibatch(subject, sizes, traits, training=False)
    with batch.seeded(), torch.no_grad():
        return batch.proved(unmarked(batch.inputs), as_output=True)


def _split_as(value: object, parts: Sequence[Shapes]) -> Iterator[object]:
    """Split `value` by microbatch; what reference 2 did not split stays whole."""
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
            columns.append([piece.clone() for piece in pieces])  # cells may change them in place
    return (
        put_together([column[m] for column in columns], part.structure)
        for m, part in enumerate(parts)
    )


def _joined(parts: Sequence[Tensor], whole: torch.Size) -> Tensor:
    if all(part.shape == whole and torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    axis = _axis_of_samples([part.shape for part in parts], whole)
    # In the parts' memory order, because random numbers are drawn in that order.
    order = sorted(range(len(whole)), key=lambda d: parts[0].stride(d), reverse=True)
    joined = torch.cat([part.permute(order) for part in parts], order.index(axis))
    return joined.permute([order.index(d) for d in range(len(whole))])


def _axis_of_samples(parts: Sequence[torch.Size], whole: torch.Size) -> int:
    """Return the dimension along which `parts` make up `whole`; raise Unsplittable if none."""
    for axis, size in enumerate(whole):
        rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in parts}
        if (
            rest == {(*whole[:axis], *whole[axis + 1 :])}
            and sum(shape[axis] for shape in parts) == size
        ):
            return axis
    raise Unsplittable
