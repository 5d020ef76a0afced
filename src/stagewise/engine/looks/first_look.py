"""Check the losses of one call for values that would silently differ from the plain model's.

Problem: microbatches are cut along one dimension, and their losses are added by weight. A loss that
is a sum, counts samples unequally, or compares the samples of its batch with each other comes out
wrong, and so does that of a batch whose first dimension is time.
Idea: join two microbatches again, and run the loss function, and each cell that adds or returns a
loss, on both apart and together, in eval mode and leaving no trace. A difference becomes a warning.
Of microbatches of one sample, those before count as one: a contrastive loss needs several samples.
A look that fails for any reason, or whose code draws random numbers, says nothing. `mixing` looks
at cells without a loss; `step.looks` decides which calls are looked at.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from stagewise.batch.pairing import Pair, RaggedError, halves_of_ragged, paired
from stagewise.batch.values import detached, output_leaves, tensors_of, versions_of
from stagewise.engine.looks.counting import weight_that_fits
from stagewise.engine.looks.loss_kind import (
    SEVERITY,
    Examined,
    Owner,
    examine,
    losses_by_name,
    scalars_of,
    words,
)
from stagewise.engine.looks.twins import drawn_from, in_eval_mode, without_trace
from stagewise.engine.stage.work import CellForward
from stagewise.model.added_losses import COLLECTING, MAIN_LOSS, LossCollector
from stagewise.model.cell import Cell

MOST_PAIRS = 3  # one may hide what another shows: class weights may happen to agree
_MOST_BYTES = 1 << 26  # of what is joined; of larger microbatches, only some samples
_FEW_SAMPLES = 4  # on two, many losses that compare samples are 0
_Run = Callable[[object], Mapping[str, Tensor]]


class FirstLook:
    """Looks at one call, at microbatches (of `sizes` samples) in pairs, as they come."""

    def __init__(
        self,
        sizes: Sequence[int],
        batch_dim: int,
        *,
        weight: Callable[..., object] | None,
        sums_losses: bool,
        loss: Callable[..., object] | None,
        unlike: Collection[int] = (),
        num_pairs: int = MOST_PAIRS,
    ) -> None:
        """After `num_pairs`, only pairs whose second microbatch is `unlike` are looked at."""
        self._sizes, self._batch_dim = sizes, batch_dim
        self._unlike, self._num_pairs = unlike, num_pairs
        self._weight, self._sums, self._loss = weight, sums_losses, loss
        # By what received it: the samples of the last microbatch, or of the joined ones up to it,
        # their value, and the versions of its tensors.
        self._kept: dict[object, tuple[int, object, list[int]]] = {}
        self._pairs: Counter[object] = Counter()  # pairs begun
        self.found: dict[str, tuple[int, str]] = {}  # what is wrong -> how badly, in words

    def watched(
        self, cell: Cell, forward: CellForward, collector: LossCollector, m: int, *, is_last: bool
    ) -> CellForward:
        """Return `forward` of microbatch m, wrapped to look at what it is called with.

        Only the last cell of the whole chain (`is_last`) may return a loss.
        """

        def watched(value: object, keywords: Mapping[str, object]) -> object:
            num_added, before = len(collector.added), versions_of(value, keywords)
            output = forward(value, keywords)
            is_loss = is_last and bool(scalars_of(output))
            adds = len(collector.added) > num_added
            if (is_loss or adds) and versions_of(value, keywords) == before:
                with self._quietly(cell.module):
                    self._cell_ran(cell, forward, m, (value, dict(keywords)), is_loss=is_loss)
            return output

        return watched

    def loss_ran(self, loss: Callable[..., object], m: int, output: object, target: object) -> None:
        """Call once the loss function has run on `output` and `target`, a list of at most one."""
        both = None
        with contextlib.suppress(Exception):
            if target or not scalars_of(output):  # else the model computed it
                both = self._both(loss, m, (output, target))
        if both is None:
            return
        values, sizes = both
        with self._quietly(loss):
            loss_of = loss
            if isinstance(loss, nn.Module) and any(True for _ in loss.buffers()):
                loss = copy.deepcopy(loss)

            def run(value: object) -> Mapping[str, Tensor]:
                named = losses_by_name(loss(value[0], *value[1]))  # type: ignore[index]
                if not all(bool(number.isfinite()) for number in named.values()):
                    self._kept.pop(loss_of, None)  # a mean over nothing, which is told by itself
                return named

            count = len(output_leaves(output))
            try:
                pair = self._pair(loss_of, values, sizes, num_differentiated=count)
            except RaggedError:
                if self._weight is None and not self._sums:
                    self._ragged(run, *halves_of_ragged(values, count), sizes)
                return
            by = "samples" if self._weight is None else "weight(target)"
            targets = [part[1] for part in pair.parts]  # type: ignore[index]
            for found in self._examined(run, pair, targets):
                fits = weight_that_fits([t[0] for t in targets if t], found.counts)
                self._note(found, _name(found.name, "the loss"), by=by, owner="function", fits=fits)

    def _note(
        self, found: Examined, what: str, *, by: str, owner: Owner, fits: str | None = None
    ) -> None:
        """Note what is wrong, unless a pair before has shown something worse."""
        badly = SEVERITY.index(found.kind)
        if badly > self.found.get(what, (-1, ""))[0]:
            self.found[what] = badly, words(found, what, by=by, owner=owner, fits=fits)

    def _examined(
        self, run: _Run, pair: Pair, targets: Sequence[Sequence[object]]
    ) -> list[Examined]:
        weights: Mapping[str, tuple[float, float]] = {}
        if self._weight is not None:
            rows = [losses_by_name(self._weight(*target)) for target in targets]
            weights = {name: _shares([float(row[name]) for row in rows]) for name in rows[0]}
        by_samples = (1.0, 1.0) if self._sums else _shares(pair.sizes)

        def counted(name: str) -> tuple[float, float]:
            return weights.get(name, weights.get(MAIN_LOSS, by_samples))

        return [*examine(run, pair.parts, pair.whole, pair.leaves, counted)]

    def _ragged(self, run: _Run, pair: Pair, dim: int, sizes: tuple[int, int]) -> None:
        """Note a loss that averages over a dimension in which microbatches differ in length."""
        shares = _shares(pair.sizes)
        unlike = {
            f.name for f in examine(run, pair.parts, pair.whole, pair.leaves, _always(shares))
        }
        unlike |= {
            f.name
            for f in examine(run, pair.parts, pair.whole, pair.leaves, _always((1.0, 1.0)))
            if f.kind in ("mixed", "sum")
        }
        for name in run(pair.whole):
            if name not in unlike:
                what = _name(name, "the loss")
                self.found[what] = (
                    0,
                    f"{what} is a mean along dimension {dim} too, in which "
                    f"microbatches differ, but they count by their samples, {sizes[0]} and "
                    f"{sizes[1]} along dimension {self._batch_dim}; give batch_dim={dim} if the "
                    "samples lie there, or Pipeline a weight(target) that returns what a "
                    "microbatch counts, such as its number of elements",
                )

    def _cell_ran(
        self, cell: Cell, forward: CellForward, m: int, given: object, *, is_loss: bool
    ) -> None:
        both = self._both(cell.index, m, given)
        if both is None:
            return
        values, sizes = both
        pair = self._pair(cell.index, values, sizes)
        with in_eval_mode(cell.module):
            run, by_samples = self._losses_of(forward, is_loss=is_loss), _shares(pair.sizes)

            def counted(name: str) -> tuple[float, float]:
                return (1.0, 1.0) if self._sums and name.startswith(_OWN) else by_samples

            for found in examine(run, pair.parts, pair.whole, pair.leaves, counted):
                if found.name.startswith(_OWN):
                    what, owner = f"the loss that cell {cell.name!r} returns", "model"
                else:
                    what, owner = f"the loss {found.name!r} that cell {cell.name!r} adds", "cell"
                self._note(found, what, by="samples", owner=owner)  # type: ignore[arg-type]

    def _losses_of(self, forward: CellForward, *, is_loss: bool) -> _Run:
        """Return what computes the losses that a cell adds and, with `is_loss`, returns."""

        def run(value: object) -> Mapping[str, Tensor]:
            collector = LossCollector()
            outer, COLLECTING.active = COLLECTING.active, collector
            try:
                output = forward(*value)  # type: ignore[misc]
            finally:
                COLLECTING.active = outer
            found: dict[str, Tensor] = {}
            for loss in collector.added:
                found[loss.name] = found.get(loss.name, 0.0) + loss.value.reshape(())
            if is_loss:
                named = (
                    scalars_of(output) if self._loss is None else losses_by_name(self._loss(output))
                )
                found |= {f"{_OWN}{name}": number for name, number in named.items()}
            return found

        return run

    def _both(
        self, who: object, m: int, value: object
    ) -> tuple[list[object], tuple[int, int]] | None:
        """Return the values and sizes of the microbatch before and of this one.

        None for the first microbatch, once enough pairs were seen, and after an in-place change.
        """
        value, before, size = detached(value), self._kept.pop(who, None), self._sizes[m]
        if self._pairs[who] < self._num_pairs or m + 1 in self._unlike:
            self._kept[who] = size, value, versions_of(value)
        self._pairs[who] += 1
        if before is None:
            return None
        first, kept, versions = before
        if versions_of(kept) != versions:  # changed in place since
            return None
        return [kept, value], (first, size)

    def _pair(
        self,
        who: object,
        values: Sequence[object],
        sizes: tuple[int, int],
        *,
        num_differentiated: int | None = None,
    ) -> Pair:
        """Join two values; if they hold few samples, both are the first of the next pair."""
        few = sum(sizes) <= _FEW_SAMPLES and 2 * _bytes(values) <= _MOST_BYTES
        pair = paired(
            values,
            sizes,
            self._batch_dim,
            most_bytes=None if few else _MOST_BYTES,
            num_differentiated=num_differentiated,
        )
        if few and sum(sizes) < _FEW_SAMPLES:
            whole = detached(pair.whole)
            self._kept[who] = sum(sizes), whole, versions_of(whole)
        return pair

    @contextlib.contextmanager
    def _quietly(self, code: object) -> Iterator[None]:
        """Look inside; errors, warnings and draws do not get out, nor what a failed look found."""
        so_far, devices = dict(self.found), {t.device for t in _state_of(code)}
        parameters = [t for t in _state_of(code) if isinstance(t, nn.Parameter)]
        with (
            without_trace(devices, parameters),
            drawn_from(devices) as drawn,
            torch.enable_grad(),
        ):
            try:
                yield
            except Exception:
                self.found = so_far
        if drawn:
            self.found = so_far


_OWN = "\0"  # before the name of a loss that is a cell's output


def _bytes(values: Sequence[object]) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(values))


def _always(counts: tuple[float, float]) -> Callable[[str], tuple[float, float]]:
    return lambda name: counts


def _shares(numbers: Sequence[float]) -> tuple[float, float]:
    first, second = numbers
    return first / (first + second), second / (first + second)


def _name(name: str, what: str) -> str:
    return what if name == MAIN_LOSS else f"{what} {name!r}"


def _state_of(code: object) -> list[Tensor]:
    return [*code.parameters(), *code.buffers()] if isinstance(code, nn.Module) else []
