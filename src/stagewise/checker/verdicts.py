"""Decide whether a pipelined step equals the plain model's, and if not, why.

It must equal the plain model by microbatch (reference 2). If the full batch (reference 1) differs
from it, the difference is explained only if reference 3 equals the pipeline.
"""

import functools

from torch import Tensor

from stagewise.batch.split import batch_size, microbatch_sizes
from stagewise.checker import culprits, proof, references
from stagewise.checker.pipelined import PipelinedStep
from stagewise.checker.references import Tensors, outputs_or_none
from stagewise.checker.subject import Subject
from stagewise.checker.traits import Unsplittable
from stagewise.checker.unfaithful import unfaithful
from stagewise.errors import CellError, UsageError
from stagewise.model.verify.differences import Reference, identical
from stagewise.parity import Configuration, ParityRow, Verdict

_SUMMED = ("gradient ", "parameter ")  # depend on the order of summation over replicas


class PlainModel:
    """The references for one number of microbatches, and verdicts against them."""

    def __init__(self, subject: Subject, num_microbatches: int, tolerance: float) -> None:
        self._subject, self._tolerance = subject, tolerance
        self._culprits: dict[bool, str] = {}  # by whether training
        size = batch_size((subject.inputs, dict(subject.keywords)), "the batch")
        self._sizes = microbatch_sizes(size, num_microbatches)
        full = references.full_batch(subject)
        loss = full["loss"]
        if loss is None or not loss.isfinite():
            raise UsageError(
                f"the plain model's loss on this batch is {loss}, so nothing can be compared; "
                "give a batch with a finite loss"
            )
        parts, self._traits, pooled = references.by_microbatch(subject, self._sizes)
        self._full = Reference(
            full | outputs_or_none(lambda: references.outputs_of_full_batch(subject))
        )
        parts |= outputs_or_none(lambda: references.outputs_by_microbatch(subject, self._sizes))
        self._parts = Reference(parts | pooled)
        self._no_outputs: Tensors = {q: None for q in parts if q.startswith("outputs")}

    @functools.cached_property
    def _proof(self) -> Reference | None:
        """Reference 3; None if nothing explains a difference, or nothing can be proved."""
        if not self._traits.reason():
            return None
        arguments = (self._subject, self._sizes, self._traits)
        try:
            tensors, pooled = proof.proof(*arguments)
            tensors |= outputs_or_none(lambda: proof.outputs_for_proof(*arguments))
        except (Unsplittable, CellError):  # a cell may fail on parts
            return None
        return Reference(tensors | pooled)

    @functools.cached_property
    def _mixing(self) -> str | None:
        """What else makes the full batch differ than what mathematics explains, if anything."""
        return culprits.mixing(self._subject, self._sizes, self._traits, self._tolerance)

    @functools.cached_property
    def _unfaithful(self) -> str | None:
        """How a captured model's cells, which the proof runs, differ from it, if they do."""
        return unfaithful(self._subject, self._sizes, self._tolerance)

    def _culprit(self, *, training: bool) -> str:
        if training not in self._culprits:
            found = culprits.culprit(
                self._subject, self._sizes, self._traits, self._tolerance, training=training
            )
            self._culprits[training] = f"; first differs: {found}" if found else ""
        return self._culprits[training]

    def compare(
        self, configuration: Configuration, run: PipelinedStep, first: Tensors
    ) -> list[ParityRow]:
        """Return a row for every quantity of `run`, which must be bit-identical to `first`.

        Failures are followed by what the step itself found wrong, with the remedy.
        """
        causes = "".join(f"; {text}" for text in run.warnings)
        rows: dict[str, ParityRow] = {}
        given = Reference({f"parameter {name}": value for name, value in run.given.items()})
        for quantity, tensor in (self._no_outputs | run.tensors).items():
            full = self._full.difference(quantity, tensor)
            parts = self._parts.difference(quantity, tensor)
            same = identical(tensor, first.get(quantity))
            verdict: Verdict
            reordered = configuration.replicas and quantity.startswith(_SUMMED)
            if not (same or reordered):
                verdict, reason = "FAILED", "not bit-identical to the first cut and policy"
            elif quantity.startswith("parameter "):
                gradient = rows[quantity.replace("parameter", "gradient", 1)]
                step = given.difference(quantity, tensor)
                verdict, reason = self._of_parameter(gradient, step, max(full, parts))
            elif not parts <= self._tolerance:
                verdict = "FAILED"
                reason = "differs from the plain model by microbatch"
            elif full <= self._tolerance:
                verdict, reason = "ok", ""
            else:
                verdict, reason = self._of_full_batch(quantity, tensor)
            rows[quantity] = ParityRow(
                configuration=configuration,
                quantity=quantity,
                full_batch=full,
                microbatched=parts,
                identical=same,
                verdict=verdict,
                reason=reason + causes if verdict == "FAILED" else reason,
            )
        return list(rows.values())

    def _of_full_batch(self, quantity: str, tensor: Tensor | None) -> tuple[Verdict, str]:
        """Return the verdict on a quantity that differs only from the full batch."""
        wrong = self._unfaithful or self._mixing
        if wrong is not None:
            return "FAILED", f"differs from the plain model on the full batch: {wrong}"
        proof = self._proof
        if proof is not None and proof.difference(quantity, tensor) <= self._tolerance:
            return "explained", self._traits.reason()
        culprit = self._culprit(training=not quantity.startswith("outputs"))
        return "FAILED", f"differs from the plain model on the full batch{culprit}"

    def _of_parameter(self, gradient: ParityRow, step: float, apart: float) -> tuple[Verdict, str]:
        """Return a parameter's verdict from its gradient's and the plain optimizer's step."""
        if not step <= self._tolerance:
            return "FAILED", "the optimizer's step differs from that on the plain model"
        if gradient.verdict != "ok":
            return gradient.verdict, gradient.reason
        if apart <= self._tolerance:
            return "ok", ""
        return "explained", "the optimizer, which magnifies the gradients' round-off"
