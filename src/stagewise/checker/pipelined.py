"""One step of the pipelined model, and its results on this rank.

Outputs are predicted once for each placement, and cells and losses are looked at once for each cut
(that took twice as long as the steps): other schedules and policies would find the same.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from stagewise.checker import references
from stagewise.checker.references import Tensors, outputs_or_none
from stagewise.checker.subject import Subject
from stagewise.errors import ExactnessWarning
from stagewise.model.chain import chain_of
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.choice import ScheduleChoice
from stagewise.planning.plan import Plan, plan_of


@dataclass(frozen=True, kw_only=True)
class PipelinedStep:
    """The results of a pipelined step on this rank; `given`: the plain update by its gradients.

    `warnings`: what the step itself finds wrong with losses and cells.
    """

    tensors: Tensors
    given: dict[str, Tensor]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Known:
    """What further runs need not find again."""

    outputs: dict[object, Tensors] = field(default_factory=dict)  # by placement
    warnings: dict[object, tuple[str, ...]] = field(default_factory=dict)  # by cut


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect exactness warnings, which the report will say, instead of showing them."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExactnessWarning)
        yield texts
    for one in caught:
        if issubclass(one.category, ExactnessWarning):
            texts.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def pipelined(
    subject: Subject,
    choice: ScheduleChoice,
    recompute: str,
    transport: Literal["local", "distributed"],
    known: Known,
) -> PipelinedStep:
    """Run one step of the pipelined model; `known` grows."""
    balance = _even(len(chain_of(subject.model)), choice.num_stages)
    plan = plan_of(choice, balance, recompute=recompute)

    build = functools.partial(_pipeline, subject, plan, transport)
    place = (choice.built.placement, plan.num_microbatches, transport)
    # A rank looks at what it runs; in one process that is all, whatever the placement.
    cut = place if transport == "distributed" else (balance, plan.num_microbatches)
    looks = cut not in known.warnings
    with _heard() as texts:
        if place not in known.outputs:
            args, _, kwargs = _call(subject)
            known.outputs[place] = outputs_or_none(
                lambda: build(looks=looks).predict(*args, **kwargs)
            )
        pipe = build(looks=looks)
        args, target, kwargs = _call(subject)
        loss = pipe.step(*args, target=target, **kwargs)
    said = known.warnings.setdefault(cut, tuple(texts))
    inputs = args[0] if args else None
    seen = subject.entering(inputs, kwargs) if pipe.rank == 0 else None
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
    return PipelinedStep(
        tensors=known.outputs[place] | tensors,
        given=references.after_optimizer(subject, gradients, norm),
        warnings=tuple(dict.fromkeys((*said, *texts))),
    )


def _pipeline(
    subject: Subject, plan: Plan, transport: Literal["local", "distributed"], *, looks: bool
) -> Pipeline:
    pipe = Pipeline(
        subject.fresh_model(),
        plan,
        loss=subject.loss,
        weight=subject.weight,
        batch_dim=subject.batch_dim,
        loss_reduction="sum" if subject.sums_losses else "mean",
        seed=subject.seed,
        transport=transport,
    )
    pipe._runner.looks.are_off = not looks
    return pipe


def _call(subject: Subject) -> tuple[tuple[object, ...], object, dict[str, Any]]:
    """Return a copy of the batch: positional arguments, target, and keyword arguments."""
    inputs, target, keywords = subject.fresh_call()
    return () if inputs is None else (inputs,), target, keywords


def _even(num_cells: int, num_stages: int) -> tuple[int, ...]:
    small, extra = divmod(num_cells, num_stages)
    return tuple(small + (stage < extra) for stage in range(num_stages))
