"""Whether what was captured is the model: asked once, on a few samples of the example.

torch.export follows one way through forward, takes sizes for numbers, and an entry on disk may be
another model's. So the cells are run beside the plain model before they are given out
(`model.verify.compare`), with one sample and another length, too. A new capture may differ by
round-off; one from disk must be the same bits, else it is made anew.
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
from stagewise.model.export.disk_cache import Plain
from stagewise.model.export.exported_cell import Program
from stagewise.model.export.refusal import lost, lost_at
from stagewise.model.forward.asked import INFERENCE, asks_for_autocast, asks_for_flags
from stagewise.model.promised_sizes import Condition
from stagewise.model.verify.compare import Mismatch, mismatch
from stagewise.model.verify.observed import check_effects, observed
from stagewise.model.verify.other_sizes import batches_of_other_sizes, first_samples, sizes_text
from stagewise.model.verify.situation import EVAL, SITUATIONS, TRAINING, UNDER_AUTOCAST

Example = Mapping[str, object]
_MANY = (2, 3, 4, 5, 7, 8, 64, 1000)


class Comparison:
    """The plain model on a few samples of its example, which cells are compared with.

    `runs_itself` are modules that its cells call. Raises ModelError where the plain model cannot
    run on its example, or does what a trace cannot hold.
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
                self._examples.pop(0)  # it may be made for one number of samples
                if not self._examples:
                    raise ModelError(
                        f"{type(model).__name__} itself fails on the example "
                        f"({type(error).__name__}: {error}), with which what is captured is "
                        "compared; give an example that the model can be run on"
                    ) from error
        check_effects(model, self._observed, draws=True)
        if (place := self._observed.asked.get(INFERENCE)) is not None:
            raise ModelError(
                f"{type(model).__name__} {INFERENCE} ({place}), which a trace answers once for all "
                "calls; decide by self.training, or name the model's blocks with cells=, whose "
                "forward asks at every call"
            )
        more = (UNDER_AUTOCAST,) if asks_for_autocast(self._observed.asked) else ()
        self._situations = (*SITUATIONS, *more)

    def tell(self, captured: Captured) -> None:
        """Let `captured` know what its watch has to overlook, and to look at."""
        captured.own_changes = self._observed.touched
        captured.asks_flags = asks_for_flags(self._observed.asked)

    def same_bits(self, captured: Captured) -> bool:
        """Whether the cells are the model, bit for bit."""
        return (
            self._difference(captured, in_bits=True) is None
            and self._at_other_sizes(captured, in_bits=True) is None
        )

    def check(self, captured: Captured) -> bool:
        """Whether they are so; raises ModelError where they differ by more than round-off."""
        if self.same_bits(captured):
            return True
        found = self._difference(captured, in_bits=False)
        if found is not None:
            raise lost(self._model, found, self._observed.asked)
        apart = self._at_other_sizes(captured, in_bits=False)
        if apart is not None:
            raise lost_at(self._model, *apart)
        return False

    def holds_for_one(self, captured: Captured) -> bool:
        """Whether the cells are the model on one sample, at the example's length and another."""
        form = captured.form
        assert isinstance(form, CallForm)
        found = False
        for batch in batches_of_other_sizes(self._examples[0], form.traced_inputs, samples=(1,)):
            try:
                if self._on(captured, batch, in_bits=False) is not None:
                    return False
                found = True
            except Exception:  # of sizes that the model does not take
                continue
        return found

    def _difference(self, captured: Captured, *, in_bits: bool) -> Mismatch | None:
        """On the first example that the cells take."""
        for example in self._examples[:-1]:
            try:
                return self._on(captured, example, in_bits=in_bits)
            except StagewiseError:  # the sizes are not those that it was captured for
                continue
        return self._on(captured, self._examples[-1], in_bits=in_bits)

    def _at_other_sizes(self, captured: Captured, *, in_bits: bool) -> tuple[Mismatch, str] | None:
        """On the first batch of other sizes that model and cells take: what differs, and there."""
        form = captured.form
        assert isinstance(form, CallForm)
        for batch in batches_of_other_sizes(self._examples[0], form.traced_inputs):
            with suppress(Exception):  # sizes that are refused in words, or by the model itself
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


def without_asking(pieces: Sequence[Plain]) -> list[Plain] | None:
    """`pieces` that take one sample; None where no condition forbids it."""
    freed = [
        dataclasses.replace(piece, programs={m: _freed(p) for m, p in piece.programs.items()})
        for piece in pieces
    ]
    return None if freed == [*pieces] else freed


def _freed(program: Program) -> Program:
    counts = {form.shape[0] for form in program.batch if form.counts_samples}
    kept = tuple(c for c in program.conditions if not _is_about_one(c, counts))
    return dataclasses.replace(program, conditions=kept)


def _is_about_one(condition: Condition, counts: set[Any]) -> bool:
    """Whether it holds for any number of samples but one."""
    symbols = condition.holds.free_symbols
    if len(symbols) != 1 or not symbols <= counts:
        return False
    (symbol,) = symbols
    answers = [condition.holds.xreplace({symbol: sympy.Integer(n)}) for n in (1, *_MANY)]
    return answers == [sympy.false, *[sympy.true] * len(_MANY)]
