"""Parity: the user's own model plain and pipelined, on the user's own batch, compared.

A pipelined step must be the plain model's run by microbatch, to round-off, and the same bits
however it is cut and whatever is recomputed. Where the plain full batch differs from it, the
difference is explained only if it vanishes once the cells that mathematics makes differ
(BatchNorm, dropout), and no others, run by microbatch. See `references.py` for the three.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stagewise.batch.markers import along
from stagewise.batch.split import batch_size, microbatch_sizes
from stagewise.batch.values import move, take_apart
from stagewise.checker import proof, references
from stagewise.checker.choices import alone, choices_of
from stagewise.checker.faithful import unfaithful
from stagewise.checker.prepare import prepared
from stagewise.checker.references import Tensors
from stagewise.checker.subject import MakeOptimizer, Model, Subject
from stagewise.engine.stage.stage import Loss
from stagewise.engine.step.weights import Weight, is_sum
from stagewise.engine.transport.connect import connect
from stagewise.engine.transport.processes import values_of_all
from stagewise.errors import BatchError, CellError, ExactnessWarning, UsageError
from stagewise.model.chain import chain_of
from stagewise.model.verify.differences import Reference, identical
from stagewise.parity import Configuration, ParityReport, ParityRow, Verdict
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.choice import ScheduleChoice
from stagewise.planning.plan import Plan
from stagewise.schedule import POLICIES, Schedule

# About 800 roundings of float32, which in our models loses at most 100, and 50 of the halves; in
# float64 far more than is ever lost and far less than any mistake.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}

_SUMMED = ("gradient ", "parameter ")  # what the order of summation over replicas changes

DEFAULT_OPTIMIZER: MakeOptimizer = functools.partial(torch.optim.SGD, lr=0.1)


def check_parity(
    model: Model,
    inputs: object,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    weight: Weight | None = None,
    optimizer: MakeOptimizer | None = DEFAULT_OPTIMIZER,
    max_norm: float | None = None,
    max_value: float | None = None,
    num_stages: Sequence[int] | None = None,
    num_devices: Sequence[int] | None = None,
    replicas: Sequence[int] = (),
    num_microbatches: int | Sequence[int] = 4,
    schedules: Sequence[str | Schedule] | None = None,
    recompute: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    transport: Literal["local", "distributed"] = "local",
    cells: Sequence[str] | None = None,
    batch_dim: int = 0,
    loss_reduction: Literal["mean", "sum"] | None = None,
) -> ParityReport:
    """Run `model` plain and pipelined on one batch, in copies, and compare all that a step leaves.

    Loss, outputs in eval mode, every gradient, buffers, and parameters after an optimizer step
    are compared with the plain model's on the full batch and by microbatch.

    Args:
        model, inputs, target, loss, weight: as for Pipeline and its `step`; left as they were. A
            module that is no chain of cells is captured from this batch, as by `stagewise.plan`,
            and the pipelined capture is compared with the module itself.
        kwargs: the step's keyword arguments.
        optimizer: makes an optimizer from a list of parameters; None leaves the update out.
        max_norm: clip gradients to this global norm before the update.
        max_value: clip each gradient's numbers to this size, before their norm.
        num_stages: numbers of stages to cut into, evenly by number of cells; a schedule is run on
            those that suit it.
        num_devices: the same by devices. By default 1, 2, 4, as far as there are cells, and under
            "distributed" the number of ranks.
        replicas: devices per stage, to run besides with the schedules that take them; of gradients
            summed over replicas the bits depend on the order, so only their values are compared.
        num_microbatches: one number or several.
        schedules, recompute: names, or schedules of one's own; by default every policy, and every
            named schedule that the engine runs.
        dtype: what to convert floating-point parameters, buffers, inputs and targets to first;
            in torch.float64 round-off is far smaller than any mistake.
        tolerance: the largest relative difference called round-off; by default TOLERANCES'.
        transport: "local" runs all stages in this process; "distributed" runs one per rank, where
            every rank makes the same call with the whole batch, and gets the same report.
        cells: paths of the modules that are to be the model's cells, as for `stagewise.plan`.
        batch_dim, loss_reduction: as for Pipeline.

    Raises:
        UsageError: an option does not fit the model or the batch, or the model cannot be copied,
            captured, or cut into `cells`.
        CellError: the model's own code failed in the pipeline.

    Example:
        >>> import torch
        >>> from stagewise.testing import check_parity
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        >>> x = torch.ones(8, 4)
        >>> check_parity(model, x, target=x, loss=torch.nn.functional.mse_loss).ok
        True
    """
    kwargs = {name: along(value, batch_dim) for name, value in (kwargs or {}).items()}
    inputs, target = along(inputs, batch_dim), along(target, batch_dim)
    model, batch, chain = prepared(model, inputs, target, kwargs, cells, dtype)
    counts = [num_microbatches] if isinstance(num_microbatches, int) else num_microbatches
    policies = [*(recompute if recompute is not None else POLICIES)]
    for what, values in (("recompute", policies), ("microbatches", counts)):
        if not values:
            raise UsageError(f"{what} is empty; name at least one, or leave it out for the default")
    choices = {
        count: choices_of(
            schedules, num_stages, num_devices, count, len(chain), transport, replicas
        )
        for count in counts
    }
    devices, _ = connect("local", None, chain, 1)
    subject = Subject(
        model=model,
        inputs=move(batch.inputs, devices[0]),
        target=move(batch.target, devices[0]),
        keywords=move(batch.keywords, devices[0]),  # type: ignore[arg-type]
        max_norm=max_norm,
        max_value=max_value,
        loss=loss,
        weight=weight,
        optimizer=optimizer,
        sums_losses=is_sum(loss, loss_reduction, has_weight=weight is not None),
        batch_dim=batch_dim,
        seed=seed,
        device=devices[0],
    )
    compared = _dtype_of(subject)
    allowed = TOLERANCES[compared] if tolerance is None else tolerance
    rows: list[ParityRow] = []
    predicted: dict[object, Tensors] = {}
    for count in counts:
        plain = _Plain(subject, count, allowed)
        for chosen in choices[count]:
            first: Tensors | None = None
            for policy, choice in itertools.product(policies, chosen):
                run = _pipelined(subject, choice, policy, transport, predicted)
                if first is None and transport == "local":
                    first = run.tensors
                elif first is None:
                    first = _pipelined(subject, alone(choice), policy, "local", predicted).tensors
                configuration = Configuration(
                    schedule=choice.name,
                    num_stages=choice.num_stages,
                    num_microbatches=count,
                    recompute=policy,
                    replicas=_devices_per_stage(choice),
                )
                rows += plain.compare(configuration, run, first)
    if transport == "distributed":
        rows = _merged(rows)
    return ParityReport(rows=tuple(rows), tolerance=allowed, dtype=str(compared).split(".")[-1])


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one pipelined step left on this rank; `given`: the plain update by its gradients."""

    tensors: Tensors
    given: dict[str, Tensor]


@contextmanager
def _unwarned() -> Iterator[None]:
    """Run inside what warns of what the report will say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExactnessWarning)
        yield


@_unwarned()
def _pipelined(
    subject: Subject,
    choice: ScheduleChoice,
    recompute: str,
    transport: Literal["local", "distributed"],
    predicted: dict[object, Tensors],
) -> _Run:
    """One step of the pipelined model; `predicted` keeps outputs for other runs."""
    plan = Plan(
        balance=_even(len(chain_of(subject.model)), choice.num_stages),
        schedule=choice.name,
        stages_per_device=choice.stages_per_device,
        replicas=choice.replicas,
        programs=choice.programs,
        num_microbatches=choice.built.num_microbatches,
        recompute=recompute,
    )

    def build() -> Pipeline:
        return Pipeline(
            subject.fresh_model(),
            plan,
            loss=subject.loss,
            weight=subject.weight,
            batch_dim=subject.batch_dim,
            loss_reduction="sum" if subject.sums_losses else "mean",
            seed=subject.seed,
            transport=transport,
        )

    key = (choice.built.placement, plan.num_microbatches, transport)
    if key not in predicted:  # the same whatever schedule and policy
        inputs, _, keywords = subject.fresh_call()
        given = () if inputs is None else (inputs,)
        predicted[key] = _outputs_or_none(lambda: build().predict(*given, **keywords))  # type: ignore[arg-type]
    pipe = build()
    inputs, target, keywords = subject.fresh_call()
    given = () if inputs is None else (inputs,)
    loss = pipe.step(*given, target=target, **keywords)  # type: ignore[call-overload]
    seen = subject.entering(inputs, keywords) if pipe.rank == 0 else None
    tensors = references.collected(loss, seen, pipe.named_parameters(), pipe.named_buffers())
    gradients = {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in pipe.named_parameters()
    }
    if subject.max_value is not None:
        pipe.clip_grad_value_(subject.max_value)
    norm = None if subject.max_norm is None else pipe.clip_grad_norm_(subject.max_norm)
    new = references.updated(subject, dict(pipe.named_parameters()))
    tensors.update((f"parameter {name}", value) for name, value in new.items())
    return _Run(
        tensors=predicted[key] | tensors, given=references.after_optimizer(subject, gradients, norm)
    )


class _Plain:
    """The references for one number of microbatches, and the verdicts by them."""

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
                "give a batch on which it is finite"
            )
        parts, self._traits, pooled = references.by_microbatch(subject, self._sizes)
        self._full = Reference(
            full | _outputs_or_none(lambda: references.outputs_of_full_batch(subject))
        )
        parts |= _outputs_or_none(lambda: references.outputs_by_microbatch(subject, self._sizes))
        self._parts = Reference(parts | pooled)
        self._no_outputs: Tensors = {q: None for q in parts if q.startswith("outputs")}

    @functools.cached_property
    def _proof(self) -> Reference | None:
        """Reference 3; None where nothing explains a difference, or nothing can be proved."""
        if not self._traits.reason():
            return None
        arguments = (self._subject, self._sizes, self._traits)
        try:
            tensors, pooled = proof.proof(*arguments)
            tensors |= _outputs_or_none(lambda: proof.outputs_for_proof(*arguments))
        except (proof.Unsplittable, CellError):  # which a cell raises where parts do not fit it
            return None
        return Reference(tensors | pooled)

    @functools.cached_property
    def _mixing(self) -> str | None:
        """What makes the full batch differ besides what mathematics explains, if anything."""
        return proof.mixing(self._subject, self._sizes, self._traits, self._tolerance)

    @functools.cached_property
    def _cause(self) -> str:
        """What the losses and cells are that cannot be split, with the remedy."""
        try:
            return "".join(f"; {problem}" for problem in proof.causes(self._subject, self._sizes))
        except Exception:  # the model's own, which fails so but not in the pipeline
            return ""

    @functools.cached_property
    def _unfaithful(self) -> str | None:
        """How a captured model's cells, which the proof runs, differ from it, if they do."""
        return unfaithful(self._subject, self._sizes, self._tolerance)

    def _culprit(self, *, training: bool) -> str:
        if training not in self._culprits:
            found = proof.culprit(
                self._subject, self._sizes, self._traits, self._tolerance, training=training
            )
            self._culprits[training] = f"; first differs: {found}" if found else ""
        return self._culprits[training]

    def compare(self, configuration: Configuration, run: _Run, first: Tensors) -> list[ParityRow]:
        """A row for every quantity of `run`; `first` is the run whose bits it must have."""
        rows: dict[str, ParityRow] = {}
        given = Reference({f"parameter {name}": value for name, value in run.given.items()})
        for quantity, tensor in (self._no_outputs | run.tensors).items():
            full = self._full.difference(quantity, tensor)
            parts = self._parts.difference(quantity, tensor)
            same = identical(tensor, first.get(quantity))
            verdict: Verdict
            reordered = configuration.replicas and quantity.startswith(_SUMMED)
            if not (same or reordered):
                verdict, reason = "FAILED", "other bits than with the first cut and policy"
            elif quantity.startswith("parameter "):
                gradient = rows[quantity.replace("parameter", "gradient", 1)]
                step = given.difference(quantity, tensor)
                verdict, reason = self._of_parameter(gradient, step, max(full, parts))
            elif not parts <= self._tolerance:
                verdict = "FAILED"
                reason = "not what the plain model gives by microbatch"
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
                reason=reason,
            )
        return list(rows.values())

    def _of_full_batch(self, quantity: str, tensor: Tensor | None) -> tuple[Verdict, str]:
        """What differs from the full batch only."""
        wrong = self._unfaithful or self._mixing
        if wrong is not None:
            why = f"not what the plain model gives on the full batch: {wrong}{self._cause}"
            return "FAILED", why
        shown = self._proof
        if shown is not None and shown.difference(quantity, tensor) <= self._tolerance:
            return "explained", self._traits.reason()
        culprit = self._culprit(training=not quantity.startswith("outputs"))
        return "FAILED", f"not what the plain model gives on the full batch{culprit}{self._cause}"

    def _of_parameter(self, gradient: ParityRow, step: float, apart: float) -> tuple[Verdict, str]:
        """A parameter is right if its gradient is, and the plain optimizer's step with that."""
        if not step <= self._tolerance:
            return "FAILED", "the optimizer did not do what it does to the plain model"
        if gradient.verdict != "ok":
            return gradient.verdict, gradient.reason
        if apart <= self._tolerance:
            return "ok", ""
        return "explained", "the optimizer, which magnifies the gradients' round-off"


def _devices_per_stage(choice: ScheduleChoice) -> tuple[int, ...]:
    """Where some stage has several."""
    numbers = tuple(map(len, choice.built.placement))
    return numbers if max(numbers) > 1 else ()


def _outputs_or_none(run: Callable[[], object]) -> Tensors:
    try:
        return _outputs(run())
    except (BatchError, proof.Unsplittable):  # not one output per sample
        return {}


def _outputs(value: object) -> Tensors:
    tensors = take_apart(value)[0]
    if len(tensors) == 1:
        return {"outputs": tensors[0].detach()}
    return {f"outputs {index}": tensor.detach() for index, tensor in enumerate(tensors)}


def _dtype_of(subject: Subject) -> torch.dtype:
    """The least precise dtype of parameters and inputs."""
    tree = references.whole_of(subject.model)
    batch = take_apart((subject.inputs, dict(subject.keywords)))[0]
    tensors = [*tree.parameters(), *batch]
    found = {t.dtype for t in tensors if t.is_floating_point()} & TOLERANCES.keys()
    return max(found or {torch.get_default_dtype()}, key=lambda dtype: TOLERANCES[dtype])


def _even(num_cells: int, num_stages: int) -> tuple[int, ...]:
    small, extra = divmod(num_cells, num_stages)
    return tuple(small + (stage < extra) for stage in range(num_stages))


def _merged(rows: list[ParityRow]) -> list[ParityRow]:
    """All ranks' rows; where several ranks have one quantity, the worst."""
    worst: dict[tuple[Configuration, str], ParityRow] = {}
    for row in itertools.chain(*values_of_all(rows)):
        key = (row.configuration, row.quantity)
        worst[key] = max(worst.get(key, row), row, key=lambda r: r.severity)
    return list(worst.values())
