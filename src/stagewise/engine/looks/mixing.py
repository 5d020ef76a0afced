"""Cells that mix the samples of a batch, tried on two microbatches apart and together.

Problem: what a cell makes of a sample by the samples beside it (a mean over the batch, a softmax
along dimension 0, attention between samples) is something else in every microbatch, and so is what
it makes of a table that was split because its first size is that of the batch.
Idea: at a first look the cells of a stage run on two microbatches and on both as one; a cell whose
outputs for the parts are not that for the whole mixes. Fresh copies run, which share the parameters
and have no dropout and no BatchNorm, so that nothing of it stays. From cell to cell the whole is
made of the parts again: no cell is blamed for another. An argument that makes the parts agree with
the whole once each of them gets all of it is the cause.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stagewise.batch.objects import opened
from stagewise.batch.pairing import Pair, UnpairableError, paired, ways_together
from stagewise.batch.values import detached, flatten, output_leaves, with_paths
from stagewise.engine.looks.twins import (
    Normalising,
    drawn_from,
    sideways_layer,
    treats_samples_alone,
    twin,
    without_trace,
)
from stagewise.engine.stage.work import RunCell, StageGiven
from stagewise.model.cell import Cell, Chain

_MOST_BYTES = 1 << 26  # of two microbatches' input to a stage, where several samples are more
_MOST_ARGUMENTS = 4
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative to the largest; of others:
_COARSE = 0.1

_Given = tuple[object, Mapping[str, object]]  # a value and keywords


class MixingLook:
    """Looks at one call: at the first two microbatches on every stage of this rank."""

    def __init__(
        self, sizes: Sequence[int], batch_dim: int, keywords: Mapping[str, object]
    ) -> None:
        """`keywords` are those of the whole batch."""
        self._sizes, self._batch_dim, self._keywords = sizes, batch_dim, keywords
        self._kept: dict[int, tuple[StageGiven, list[int]]] = {}  # by a stage's first cell
        self._carried: dict[int, list[object]] = {}  # what that is given, if no pair tells
        self.found: dict[str, str] = {}  # by the cell's name

    def stage_begins(self, cells: Chain, run: RunCell, given: StageGiven, m: int) -> None:
        """Call before `cells` run on what they are given of microbatch m."""
        first = cells[0].index
        if m > 1 or all(treats_samples_alone(cell.module) for cell in cells):
            return
        given = detached(given)  # type: ignore[assignment]
        before, versions = self._kept.pop(first, (None, []))
        if m == 0:
            self._kept[first] = given, _versions(given)
        elif before is not None and versions == _versions(before):
            devices = {t.device for t in tensors_of(given)}
            with without_trace(devices), suppress(Exception):
                self._through(cells, run, [before, given], devices)

    def _through(
        self,
        cells: Chain,
        run: RunCell,
        both: Sequence[StageGiven],
        devices: Collection[torch.device],
    ) -> None:
        """Run the cells, one after the other, on both parts and on their whole."""
        first, sizes = cells[0].index, (self._sizes[0], self._sizes[1])
        if first in self._carried:
            given: list[StageGiven] = [(value, {}) for value in self._carried.pop(first)]
        else:
            pair = self._pair(both, sizes)
            given, sizes = [*pair.parts, pair.whole], pair.sizes  # type: ignore[list-item]
            if not _counts_samples(pair):
                return
        values = [_fresh(value) for value, _ in given]
        for cell in cells:
            named = [keywords.get(cell.index, {}) for _, keywords in given]
            each = [*zip(values, named, strict=True)]
            trial = _Trial(cell, run, each, sizes, self._batch_dim)
            outputs = trial.outputs(devices)
            differs = outputs is None or trial.differs(outputs)
            if differs and (outputs is None or (trial.says and trial.repeats(outputs))):
                cause = trial.cause(self._keywords, sum(self._sizes))
                if outputs is not None or cause is not None:
                    self.found[cell.name] = _words(cell, cause, self._batch_dim, self._sizes)
            if outputs is None:
                return
            values = trial.with_whole_of_parts(outputs)
        if not self._tells(values, sizes):
            self._carried[cells[-1].index + 1] = values

    def _pair(self, both: Sequence[object], sizes: tuple[int, int]) -> Pair:
        values, most = [opened(part) for part in both], _MOST_BYTES
        return paired(values, sizes, self._batch_dim, most_bytes=most, num_differentiated=0)

    def _tells(self, values: Sequence[object], sizes: tuple[int, int]) -> bool:
        """Whether the whole can be made of the parts, as they will reach the next stage."""
        try:
            whole = self._pair(values[:2], sizes).whole
        except UnpairableError:
            return False
        pairs = [*zip(tensors_of(whole), tensors_of(values[2]), strict=True)]
        return all(map(torch.equal, *zip(*pairs, strict=True))) if pairs else True


class _Trial:
    """One cell on the two parts of what it is given, and on their whole."""

    def __init__(
        self,
        cell: Cell,
        run: RunCell,
        given: Sequence[_Given],
        sizes: tuple[int, int],
        batch_dim: int,
    ) -> None:
        self._cell, self._run, self._given = cell, run, given
        self._sizes, self._batch_dim = sizes, batch_dim
        self._in_eval = not cell.module.training
        self.says = True  # whether a difference says anything

    def outputs(self, devices: Collection[torch.device]) -> list[object] | None:
        """Of the parts and the whole; None where that of the whole fails."""
        found = self._outputs(devices)
        if self.says or self._in_eval:
            return found
        self._in_eval, self.says = True, True
        return self._outputs(devices)

    def _outputs(self, devices: Collection[torch.device]) -> list[object] | None:
        found: list[object] | None
        with drawn_from(devices) as moved, Normalising() as normalising:
            found = [self._called(*part) for part in self._given[:2]]
            try:
                found.append(self._called(*self._given[2]))
            except Exception:
                found = None
        self.says = not moved and not normalising.found
        return found

    def _called(self, value: object, keywords: Mapping[str, object]) -> object:
        value, keywords = _fresh((value, keywords))  # type: ignore[misc]
        return self._run(twin(self._cell, in_eval=self._in_eval), value, keywords)

    def differs(self, outputs: Sequence[object]) -> bool:
        """Whether the whole's is something else than those of its parts put together."""
        one, two, whole = every = [*map(tensors_of, outputs)]
        if len({*map(len, every)}) > 1:  # other ways through the code: what came of each, last
            one, two, whole = ([t for t in ts if t.is_floating_point()][-1:] for ts in every)
        rows, tolerance = zip(one, two, whole, strict=True), self._tolerance(every[2])
        return any(self._differ(*row, tolerance) for row in rows)

    def repeats(self, outputs: Sequence[object]) -> bool:
        """Whether the same outputs come again: the cell draws and counts nowhere."""
        again = [self._called(*given) for given in self._given]
        pairs = zip(tensors_of([*outputs]), tensors_of(again), strict=True)
        return all(_near(one, other, self._tolerance([one])) for one, other in pairs)

    def _differ(self, one: Tensor, two: Tensor, whole: Tensor, tolerance: float) -> bool:
        if not whole.is_floating_point() or whole.shape in (one.shape, two.shape):
            return False
        ways = [*ways_together(one, two, whole.shape, self._sizes, self._batch_dim)]
        if ways:
            return not any(_near(way, whole, tolerance) for way in ways)
        sizes = [*zip(one.shape, two.shape, whole.shape, strict=False)]
        grown = [a + b == both for a, b, both in sizes if a != both]
        return one.dim() == whole.dim() and len(grown) > 1 and all(grown)  # samples by samples

    def _tolerance(self, tensors: Sequence[Tensor]) -> float:
        if any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors):
            return _COARSE
        every = itertools.chain(tensors, self._cell.module.parameters())
        return max(_TOLERANCES.get(t.dtype, _COARSE) for t in every if t.is_floating_point())

    def with_whole_of_parts(self, outputs: Sequence[object]) -> list[object]:
        """The outputs, with the parts' own in the whole, as far as they can be put together."""
        one, two = ([*output_leaves(output)] for output in outputs[:2])
        leaves, spec = flatten(opened(outputs[2]))
        tolerance = self._tolerance(tensors_of(outputs[2]))
        for index, (a, b, both) in enumerate(zip(one, two, leaves, strict=True)):
            if isinstance(both, Tensor) and both.is_floating_point():
                assert isinstance(a, Tensor) and isinstance(b, Tensor)
                ways = [*ways_together(a, b, both.shape, self._sizes, self._batch_dim)]
                near = [way for way in ways if _near(way, both, tolerance)]
                leaves[index] = next(iter([*near, *ways]), both)
        return [*outputs[:2], pytree.tree_unflatten(leaves, spec)]

    def cause(self, keywords: Mapping[str, object], num_samples: int) -> list[str] | None:
        """The arguments of the batch's size that the cell needs whole, if that is all."""
        flat = [with_paths((opened(value), dict(named))) for value, named in self._given]
        columns = [*zip(*flat, strict=True)]
        wholes: dict[int, tuple[str, object]] = {}
        for index, ((path, one), _, (_, whole)) in enumerate(columns):
            if isinstance(one, Tensor) and isinstance(whole, Tensor) and one.shape != whole.shape:
                name = path.removeprefix("[1]['").removesuffix("']")
                full = keywords.get(name) if path.startswith("[1]") else whole
                is_split = isinstance(full, Tensor) and len(full) in (num_samples, len(whole))
                if is_split:
                    wholes[index] = name.replace("[0]", "input", 1), full
        for count in range(1, min(len(wholes), _MOST_ARGUMENTS) + 1):
            for chosen in itertools.combinations(wholes, count):
                if self._agrees_with({index: wholes[index][1] for index in chosen}):
                    return [wholes[index][0] for index in chosen]
        return None

    def _agrees_with(self, wholes: Mapping[int, object]) -> bool:
        """Whether the parts agree with the whole once all get `wholes`, by places."""
        outputs = []
        with suppress(Exception):
            for given in self._given:
                leaves, spec = flatten((opened(given[0]), dict(given[1])))
                leaves = [wholes.get(index, leaf) for index, leaf in enumerate(leaves)]
                value, named = pytree.tree_unflatten(leaves, spec)
                outputs.append(self._called(value, named))
            one, two, whole = map(tensors_of, outputs)
            tolerance = self._tolerance(whole)
            pairs = [
                (torch.cat([a, b], self._batch_dim), both)
                for a, b, both in zip(one, two, whole, strict=True)
                if both.is_floating_point() and both.dim() > self._batch_dim
            ]
            return bool(pairs) and all(
                joined.shape == both.shape
                and both.shape[self._batch_dim] == sum(self._sizes)
                and _near(joined, both, tolerance)
                for joined, both in pairs
            )
        return False


def _words(cell: Cell, cause: list[str] | None, batch_dim: int, sizes: Sequence[int]) -> str:
    name, cut = f"cell {cell.name!r}", f"microbatches of {sizes[0]}, {sizes[1]}, ..."
    if cause is not None:
        return (
            f"{name} uses the whole of {' and '.join(cause)} for every sample, but that was cut "
            f"into {cut} as if it held one entry for each sample, since it has the batch's size; "
            "mark it in the batch with stagewise.Replicated, so that every microbatch gets it "
            "whole (or plan num_microbatches=1)"
        )
    if (layer := sideways_layer(cell.module, batch_dim)) is not None:
        return (
            f"{name} has a {layer}, and mixes what lies along dimension {batch_dim}, along which "
            f"the batch was cut into {cut} as its samples; give Pipeline "
            f"batch_dim={1 - batch_dim}, or bring the samples to dimension {batch_dim}"
        )
    return (
        f"{name} mixes samples: what it returns for one depends on the others of its microbatch, "
        "or on its place (a mean, softmax, attention, routing, count or branch over the batch), so "
        f"that {cut} along dimension {batch_dim} give something else than the whole batch; let it "
        "treat every sample by itself, make what compares samples part of the loss, or plan "
        "num_microbatches=1; if samples lie along another dimension, give Pipeline batch_dim, and "
        "mark with stagewise.Replicated what all samples share"
    )


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in `value`."""
    return [leaf for leaf in output_leaves(value) if isinstance(leaf, Tensor)]


def _counts_samples(pair: Pair) -> bool:
    """Whether what was put together holds one entry per sample, so that its order is known."""
    for one, whole in zip(tensors_of(pair.parts[0]), tensors_of(pair.whole), strict=True):
        sizes = [size for size, both in zip(one.shape, whole.shape, strict=True) if size != both]
        if sizes and sizes != [pair.sizes[0]]:
            return False
    return True


def _fresh(value: object) -> object:
    leaves, spec = flatten(opened(value))
    copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(copies, spec)


def _versions(value: object) -> list[int]:
    return [tensor._version for tensor in tensors_of(value)]


def _near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    atol = tolerance * float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=atol, equal_nan=True)
