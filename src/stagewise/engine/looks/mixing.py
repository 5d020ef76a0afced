"""Find cells that mix the samples of a batch, by running them on microbatches apart and together.

Problem: a cell that computes a sample's output from the samples beside it (a mean over the batch, a
softmax along dimension 0, attention between samples, an expert's capacity) computes something else
in every microbatch. So does one that gets a part of a table that it needs whole, which was split
because its first size happens to be the batch's.
Idea: run the cells of a stage on a call's microbatches and on their whole. If outputs or gradients
of the parts do not make up the whole's, the cell mixes samples (`trial`). Copies run, with
dropout and BatchNorm in eval mode, and what they write is put back. The next cell gets the outputs
of the parts, joined, as its whole, so that no cell is blamed for another. If all agree once every
part gets some argument whole, that argument is the cause. Of large batches, two microbatches count
as the whole.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from stagewise.batch.objects import opened
from stagewise.batch.pairing import Pair, UnpairableError, paired
from stagewise.batch.values import detached, tensors_of, versions_of
from stagewise.engine.looks.trial import Trial, fresh
from stagewise.engine.looks.twins import sideways_layer, treats_samples_alone, without_trace
from stagewise.engine.looks.whole import Division
from stagewise.engine.stage.work import RunCell, StageGiven
from stagewise.free_pages import trim_of_glibc
from stagewise.model.cell import Cell, Chain
from stagewise.model.forward.users_code import is_stock
from stagewise.model.forward.viewpoint import Viewpoint
from stagewise.model.forward.visible import Sight

_MOST_BYTES = 1 << 26  # of two microbatches' input to a stage
# Of a whole batch's. A cell's activations are many times its input: those of more than two
# microbatches may exceed what the step itself needs.
_MOST_BYTES_OF_ALL = 1 << 20


@dataclass
class _Kept:
    """What a stage is given of the first microbatches, until there are `count`."""

    count: int
    parts: list[tuple[StageGiven, list[int]]] = field(default_factory=list)  # with versions


class MixingLook:
    """Looks at one call: at the first microbatches on every stage of this rank."""

    def __init__(
        self,
        sizes: Sequence[int],
        batch_dim: int,
        keywords: Mapping[str, object],
        *,
        with_backward: bool,
        sight: Sight,
    ) -> None:
        """`keywords` are those of the whole batch; `sight` is of all cells, kept between calls."""
        self._sizes, self._batch_dim, self._keywords = tuple(sizes), batch_dim, keywords
        self._with_backward, self._sight = with_backward, sight
        self._kept: dict[int, _Kept] = {}  # by a stage's first cell
        # What that stage gets from the one before, if messages do not tell, and the parts' sizes.
        self._carried: dict[int, tuple[list[object], tuple[int, ...]]] = {}
        self.found: dict[str, str] = {}  # by the cell's name
        self._trim = trim_of_glibc()

    def stage_begins(self, cells: Chain, run: RunCell, given: StageGiven, m: int) -> None:
        """Call before `cells` run on what they are given of microbatch m."""
        first = cells[0].index
        if m == 0 and not all(treats_samples_alone(cell.module) for cell in cells):
            self._kept[first] = _Kept(self._num_joined(given))
        kept = self._kept.get(first)
        if kept is None or m != len(kept.parts):
            return
        value, named = given
        tensors = [*tensors_of(value), *tensors_of(named)]
        differentiable = any(tensor.requires_grad for tensor in tensors)
        given = detached(value), named and detached(named)  # type: ignore[assignment]
        kept.parts.append((given, versions_of(*given)))
        if len(kept.parts) == kept.count:
            del self._kept[first]
            if all(versions == versions_of(*part) for part, versions in kept.parts):
                devices = {tensor.device for tensor in tensors}
                parameters = [p for cell in cells for p in cell.module.parameters()]
                modules = [cell.module for cell in cells if not is_stock(cell.module)]
                now = Viewpoint(self._sight, *modules).take
                with without_trace(devices, parameters), suppress(Exception), now().kept(now):
                    parts = [part for part, _ in kept.parts]
                    if self._trim is not None:
                        self._trim()
                    self._through(cells, run, parts, devices, differentiable=differentiable)

    def _num_joined(self, given: StageGiven) -> int:
        """Return how many microbatches to join: all if small, since some cells mix only many."""
        taken = sum(tensor.nbytes for value in given for tensor in tensors_of(value))
        return len(self._sizes) if taken * len(self._sizes) <= _MOST_BYTES_OF_ALL else 2

    def _through(
        self,
        cells: Chain,
        run: RunCell,
        parts: Sequence[StageGiven],
        devices: Collection[torch.device],
        *,
        differentiable: bool,
    ) -> None:
        """Run the cells, one after the other, on the parts and on their whole."""
        first = cells[0].index
        if first in self._carried:
            carried, sizes = self._carried.pop(first)
            given: list[StageGiven] = [(value, {}) for value in carried]
        else:
            pair = self._joined(parts)
            given, sizes = [*pair.parts, pair.whole], pair.sizes  # type: ignore[list-item]
            if not _counts_samples(pair):
                return
        division = Division(sizes, self._batch_dim)
        values = [fresh(value) for value, _ in given]
        for cell in cells:
            named = [keywords.get(cell.index, {}) for _, keywords in given]
            differentiable |= any(p.requires_grad for p in cell.module.parameters())
            backward = self._with_backward and differentiable
            each = [*zip(values, named, strict=True)]
            trial = Trial(cell, run, each, division, with_backward=backward)
            runs = trial.run(devices)
            if text := self._wrong(cell, trial, runs=runs):
                self.found[cell.name] = text
            if not runs:
                return
            values = trial.values()
        if not self._tells(values, sizes):
            self._carried[cells[-1].index + 1] = values, sizes

    def _wrong(self, cell: Cell, trial: Trial, *, runs: bool) -> str | None:
        if not runs:
            cause = trial.cause(self._keywords, sum(self._sizes))
            return _words(cell, cause, self._batch_dim, self._sizes) if cause else None
        if trial.differs():
            if trial.repeats():
                cause = trial.cause(self._keywords, sum(self._sizes))
                return _words(cell, cause, self._batch_dim, self._sizes)
            return None
        return _of_backward(cell, self._sizes) if trial.backward_differs() else None

    def _joined(self, parts: Sequence[object]) -> Pair:
        with suppress(UnpairableError):
            return self._pair(parts, self._sizes[: len(parts)])
        return self._pair(parts[:2], self._sizes[:2])

    def _pair(self, parts: Sequence[object], sizes: tuple[int, ...]) -> Pair:
        values = [opened(part) for part in parts]
        most = _MOST_BYTES if len(parts) == 2 else None
        return paired(values, sizes, self._batch_dim, most_bytes=most, num_differentiated=0)

    def _tells(self, values: Sequence[object], sizes: tuple[int, ...]) -> bool:
        """Return whether the next stage can make the whole from the parts that will reach it."""
        try:
            whole = self._pair(values[:-1], sizes).whole
        except UnpairableError:
            return False
        pairs = [*zip(tensors_of(whole), tensors_of(values[-1]), strict=True)]
        return all(map(torch.equal, *zip(*pairs, strict=True))) if pairs else True


def _of_backward(cell: Cell, sizes: Sequence[int]) -> str:
    return (
        f"cell {cell.name!r} mixes samples in backward: its backward depends on the other samples, "
        "though its output does not (a hook or autograd.Function that divides a gradient by "
        "its norm, a straight-through estimate over the batch), so that gradients in microbatches "
        f"of {sizes[0]}, {sizes[1]}, ... differ from the whole batch's; let its backward treat "
        "every sample by itself, clip gradients of parameters after the step, or plan "
        "num_microbatches=1"
    )


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


def _counts_samples(pair: Pair) -> bool:
    """Return whether what was joined holds one entry per sample, so that its order is known."""
    for one, whole in zip(tensors_of(pair.parts[0]), tensors_of(pair.whole), strict=True):
        sizes = [size for size, both in zip(one.shape, whole.shape, strict=True) if size != both]
        if sizes and sizes != [pair.sizes[0]]:
            return False
    return True
