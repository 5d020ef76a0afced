"""Parity: compare the user's model, plain and pipelined, on the user's batch.

A pipelined step must equal the plain model run by microbatch, up to round-off, and be bit-identical
for every cut and recomputation policy. If the plain full batch differs, the difference is explained
only if it vanishes when the cells for which mathematics allows it (BatchNorm, dropout), and no
others, run by microbatch. See `references.py` for the three references.
"""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from stagewise.batch.markers import along
from stagewise.batch.values import move, take_apart
from stagewise.checker import references
from stagewise.checker.choices import alone, choices_of
from stagewise.checker.pipelined import Known, pipelined
from stagewise.checker.prepared import prepared
from stagewise.checker.references import Tensors
from stagewise.checker.subject import MakeOptimizer, Model, Subject
from stagewise.checker.verdicts import PlainModel
from stagewise.engine.stage.loss import Loss
from stagewise.engine.step.weights import Weight, is_sum
from stagewise.engine.transport.connect import connect, values_of_all
from stagewise.errors import ExactnessWarning, UsageError
from stagewise.model.forward.users_code import warn_user
from stagewise.parity import Configuration, ParityReport, ParityRow
from stagewise.planning.choice import ScheduleChoice
from stagewise.schedule import POLICIES, Schedule

# About 800 roundings of float32 (our models lose at most 100) and 50 of the 16-bit dtypes; in
# float64, far more than any round-off and far less than any error.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}

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
    """Run copies of `model`, plain and pipelined, on one batch and compare the results of a step.

    Loss, outputs in eval mode, every gradient, buffers, and parameters after an optimizer step
    are compared with the plain model's on the full batch and by microbatch.

    Args:
        model, inputs, target, loss, weight: as for Pipeline and its `step`; they are not changed. A
            module that is not a sequence of cells is captured from this batch, as by
            `stagewise.plan`, and the pipelined capture is compared with the module itself.
        kwargs: the step's keyword arguments.
        optimizer: makes an optimizer from a list of parameters; None omits the update.
        max_norm: clip gradients to this global norm before the update.
        max_value: clip the elements of gradients to this size, before their norm.
        num_stages: numbers of stages to try, cut evenly by number of cells; each schedule runs
            those that it supports.
        num_devices: numbers of devices instead. By default 1, 2, 4, as long as there are enough
            cells, and under "distributed" the number of ranks.
        replicas: devices per stage, an additional run of the schedules that support them; gradients
            summed over replicas depend on the order, so only their values are compared, not bits.
        num_microbatches: one number or several.
        schedules, recompute: names, or custom schedules; by default every policy, and every named
            schedule that the engine runs.
        dtype: convert floating-point parameters, buffers, inputs and targets to it first; in
            torch.float64, round-off is far smaller than any error.
        tolerance: the largest relative difference that counts as round-off; by default TOLERANCES.
        transport: "local" runs all stages in this process; "distributed" runs one per rank: every
            rank makes the same call with the whole batch, and gets the same report.
        cells: paths of the modules to use as the model's cells, as for `stagewise.plan`.
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
    if transport == "distributed":
        values_of_all(None, "check_parity")
    compared = _dtype_of(subject)
    allowed = TOLERANCES[compared] if tolerance is None else tolerance
    rows: list[ParityRow] = []
    warned: list[str] = []
    known = Known()
    for count in counts:
        plain = PlainModel(subject, count, allowed)
        for chosen in choices[count]:
            first: Tensors | None = None
            for policy, choice in itertools.product(policies, chosen):
                run = pipelined(subject, choice, policy, transport, known)
                if first is None and transport == "local":
                    first = run.tensors
                elif first is None:
                    first = pipelined(subject, alone(choice), policy, "local", known).tensors
                configuration = Configuration(
                    schedule=choice.name,
                    num_stages=choice.num_stages,
                    num_microbatches=count,
                    recompute=policy,
                    replicas=_devices_per_stage(choice),
                )
                rows += plain.compare(configuration, run, first)
                warned += run.warnings
    if transport == "distributed":
        rows = _merged(rows)
    report = ParityReport(rows=tuple(rows), tolerance=allowed, dtype=str(compared).split(".")[-1])
    if report.ok:  # in this step: what a cell carries over may tell in later ones
        for text in {re.sub(r"\d+", "#", text): text for text in warned}.values():
            warn_user(text, ExactnessWarning)
    return report


def _devices_per_stage(choice: ScheduleChoice) -> tuple[int, ...]:
    """Return the devices per stage if some stage has several, otherwise nothing."""
    numbers = tuple(map(len, choice.built.placement))
    return numbers if max(numbers) > 1 else ()


def _dtype_of(subject: Subject) -> torch.dtype:
    """Return the least precise dtype of parameters and inputs."""
    tree = references.whole_of(subject.model)
    batch = take_apart((subject.inputs, dict(subject.keywords)))[0]
    tensors = [*tree.parameters(), *batch]
    found = {t.dtype for t in tensors if t.is_floating_point()} & TOLERANCES.keys()
    return max(found or {torch.get_default_dtype()}, key=lambda dtype: TOLERANCES[dtype])


def _merged(rows: list[ParityRow]) -> list[ParityRow]:
    """Return all ranks' rows; if several ranks have the same quantity, the worst."""
    worst: dict[tuple[Configuration, str], ParityRow] = {}
    for row in itertools.chain(*values_of_all(rows, "check_parity: what was compared")):
        key = (row.configuration, row.quantity)
        worst[key] = max(worst.get(key, row), row, key=lambda r: r.severity)
    return list(worst.values())
