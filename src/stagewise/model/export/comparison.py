"""Compare a capture with the plain model once, on a few samples of the example.

torch.export follows one path through forward and bakes in sizes, and an entry on disk may be
another model's. So the cells and the plain model are compared before the capture is returned
(`model.verify.compare`), also with one sample and another length. A new capture may differ by
round-off; one from disk must have the same bits, or it is replaced.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import sympy
from torch import nn

from stagewise.errors import ModelError, StagewiseError
from stagewise.model.call_form import CallForm
from stagewise.model.captured import Captured
from stagewise.model.export.disk_cache import CellBlueprint
from stagewise.model.export.exported_cell import Program
from stagewise.model.export.refusal import differs, differs_at_sizes
from stagewise.model.forward.asked import GRADIENTS, INFERENCE, asks_for_autocast, asks_for_flags
from stagewise.model.promised_sizes import Condition
from stagewise.model.verify.compare import Mismatch, mismatch
from stagewise.model.verify.observed import check_effects, observed
from stagewise.model.verify.other_sizes import batches_of_other_sizes, first_samples, sizes_text
from stagewise.model.verify.situation import EVAL, SITUATIONS, TRAINING, UNDER_AUTOCAST

Example = Mapping[str, object]
_MANY = (2, 3, 4, 5, 7, 8, 64, 1000)


class Comparison:
    """The plain model on a few samples of its example, to compare cells with.

    `runs_itself` are modules that its cells call. Raises ModelError if the plain model cannot run
    on its example, or does something a trace cannot represent.
    """

    def __init__(
        self, model: nn.Module, example: Example, runs_itself: Collection[nn.Module]
    ) -> None:
        self._model = model
        self._examples = [few for few in [first_samples(example)] if few is not None] + [example]
        while True:
            try:
                self._observed = observed(model, self._examples[0], runs_itself)
                break
            except Exception as error:
                self._examples.pop(0)  # it may only work for one number of samples
                if not self._examples:
                    raise ModelError(
                        f"{type(model).__name__} itself fails on the example "
                        f"({type(error).__name__}: {error}), with which the capture is compared; "
                        "give an example that the model can run"
                    ) from error
        check_effects(model, self._observed, draws=True)
        if (place := self._observed.asked.get(INFERENCE)) is not None:
            raise ModelError(
                f"{type(model).__name__} {INFERENCE} ({place}), which it never is in a pipeline, "
                "whose predict runs under torch.no_grad; decide by self.training, or by whether "
                "gradients are on in blocks that are named with cells="
            )
        if (place := self._observed.asked.get(GRADIENTS)) is not None:
            raise ModelError(
                f"{type(model).__name__} {GRADIENTS} ({place}), which its cells would fix to that "
                "of now, and which in a pipeline grows from microbatch to microbatch; decide by a "
                "buffer that you change between steps"
            )
        more = (UNDER_AUTOCAST,) if asks_for_autocast(self._observed.asked) else ()
        self._situations = (*SITUATIONS, *more)

    def configure(self, captured: Captured) -> None:
        """Set what the watch of `captured` must ignore, and what it must check."""
        captured.own_changes = self._observed.touched
        captured.asks_flags = asks_for_flags(self._observed.asked)

    def same_bits(self, captured: Captured) -> bool:
        """Return whether the cells equal the model, bit for bit."""
        return (
            self._difference(captured, in_bits=True) is None
            and self._at_other_sizes(captured, in_bits=True) is None
        )

    def check(self, captured: Captured) -> bool:
        """Return whether they do; ModelError if they differ by more than round-off."""
        if self.same_bits(captured):
            return True
        found = self._difference(captured, in_bits=False)
        if found is not None:
            raise differs(self._model, found, self._observed.asked)
        apart = self._at_other_sizes(captured, in_bits=False)
        if apart is not None:
            raise differs_at_sizes(self._model, *apart)
        return False

    def holds_for_one(self, captured: Captured) -> bool:
        """Return whether the cells equal the model on one sample, at two lengths."""
        form = captured.form
        assert isinstance(form, CallForm)
        found = False
        for batch in batches_of_other_sizes(self._examples[0], form.traced_inputs, samples=(1,)):
            try:
                if self._on(captured, batch, in_bits=False) is not None:
                    return False
                found = True
            except Exception:  # sizes that the model does not support
                continue
        return found

    def _difference(self, captured: Captured, *, in_bits: bool) -> Mismatch | None:
        """Compare on the first example that the cells accept."""
        for example in self._examples[:-1]:
            try:
                return self._on(captured, example, in_bits=in_bits)
            except StagewiseError:  # sizes for which it was not captured
                continue
        return self._on(captured, self._examples[-1], in_bits=in_bits)

    def _at_other_sizes(self, captured: Captured, *, in_bits: bool) -> tuple[Mismatch, str] | None:
        """Compare on the first batch of other sizes that model and cells accept."""
        form = captured.form
        assert isinstance(form, CallForm)
        for batch in batches_of_other_sizes(self._examples[0], form.traced_inputs):
            with suppress(Exception):  # sizes refused by the cells or the model
                for situation in (TRAINING, EVAL):
                    found = mismatch(self._model, captured, batch, situation, in_bits=in_bits)
                    if found is not None:
                        return found, sizes_text(batch)
                return None
        return None

    def _on(self, captured: Captured, example: Example, *, in_bits: bool) -> Mismatch | None:
        found = (
            mismatch(self._model, captured, example, situation, in_bits=in_bits)
            for situation in self._situations
        )
        return next((one for one in found if one is not None), None)


def allowing_one_sample(blueprints: Sequence[CellBlueprint]) -> list[CellBlueprint] | None:
    """Return them without conditions that forbid a single sample; None if there are none."""
    freed = [
        dataclasses.replace(cell, programs={m: _freed(p) for m, p in cell.programs.items()})
        for cell in blueprints
    ]
    return None if freed == [*blueprints] else freed


def _freed(program: Program) -> Program:
    counts = {form.shape[0] for form in program.batch if form.counts_samples}
    kept = tuple(c for c in program.conditions if not _is_about_one(c, counts))
    return dataclasses.replace(program, conditions=kept)


def _is_about_one(condition: Condition, counts: set[Any]) -> bool:
    """Return whether it holds for any number of samples except one."""
    symbols = condition.holds.free_symbols
    if len(symbols) != 1 or not symbols <= counts:
        return False
    (symbol,) = symbols
    answers = [condition.holds.xreplace({symbol: sympy.Integer(n)}) for n in (1, *_MANY)]
    return answers == [sympy.false, *[sympy.true] * len(_MANY)]
