"""Parity: the user's own model plain and pipelined, on the user's own batch, compared.

A pipelined step must be the plain model's run by microbatch, to round-off, and the same bits
however it is cut and whatever is recomputed. Where the plain full batch differs from it, the
difference is explained only if it vanishes once the cells that mathematics makes differ
(BatchNorm, dropout), and no others, run by microbatch. See `references.py` for the three.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from stagewise.batch.markers import along
from stagewise.batch.values import move, take_apart
from stagewise.checker import references
from stagewise.checker.choices import alone, choices_of
from stagewise.checker.pipelined import pipelined
from stagewise.checker.prepared import prepared
from stagewise.checker.references import Tensors
from stagewise.checker.subject import MakeOptimizer, Model, Subject
from stagewise.checker.verdicts import PlainModel
from stagewise.engine.stage.loss import Loss
from stagewise.engine.step.weights import Weight, is_sum
from stagewise.engine.transport.connect import connect, values_of_all
from stagewise.errors import UsageError
from stagewise.parity import Configuration, ParityReport, ParityRow
from stagewise.planning.choice import ScheduleChoice
from stagewise.schedule import POLICIES, Schedule

# About 800 roundings of float32, which in our models loses at most 100, and 50 of the halves; in
# float64 far more than is ever lost and far less than any mistake.
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
    """Run `model` plain and pipelined on one batch, in copies, and compare all that a step leaves.

    Loss, outputs in eval mode, every gradient, buffers, and parameters after an optimizer step
    are compared with the plain model's on the full batch and by microbatch.

    Args:
        model, inputs, target, loss, weight: as for Pipeline and its `step`; left as they were. A
            module that is no sequence of cells is captured from this batch, as by `stagewise.plan`,
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
    if transport == "distributed":
        values_of_all(None, "check_parity")
    compared = _dtype_of(subject)
    allowed = TOLERANCES[compared] if tolerance is None else tolerance
    rows: list[ParityRow] = []
    predicted: dict[object, Tensors] = {}
    for count in counts:
        plain = PlainModel(subject, count, allowed)
        for chosen in choices[count]:
            first: Tensors | None = None
            for policy, choice in itertools.product(policies, chosen):
                run = pipelined(subject, choice, policy, transport, predicted)
                if first is None and transport == "local":
                    first = run.tensors
                elif first is None:
                    first = pipelined(subject, alone(choice), policy, "local", predicted).tensors
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


def _devices_per_stage(choice: ScheduleChoice) -> tuple[int, ...]:
    """Where some stage has several."""
    numbers = tuple(map(len, choice.built.placement))
    return numbers if max(numbers) > 1 else ()


def _dtype_of(subject: Subject) -> torch.dtype:
    """The least precise dtype of parameters and inputs."""
    tree = references.whole_of(subject.model)
    batch = take_apart((subject.inputs, dict(subject.keywords)))[0]
    tensors = [*tree.parameters(), *batch]
    found = {t.dtype for t in tensors if t.is_floating_point()} & TOLERANCES.keys()
    return max(found or {torch.get_default_dtype()}, key=lambda dtype: TOLERANCES[dtype])


def _merged(rows: list[ParityRow]) -> list[ParityRow]:
    """All ranks' rows; where several ranks have one quantity, the worst."""
    worst: dict[tuple[Configuration, str], ParityRow] = {}
    for row in itertools.chain(*values_of_all(rows, "check_parity: what was compared")):
        key = (row.configuration, row.quantity)
        worst[key] = max(worst.get(key, row), row, key=lambda r: r.severity)
    return list(worst.values())
