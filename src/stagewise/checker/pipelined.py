"""One step of the pipelined model, and its results on this rank."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from stagewise.checker import references
from stagewise.checker.references import Tensors, outputs_or_none
from stagewise.checker.subject import Subject
from stagewise.errors import ExactnessWarning
from stagewise.model.chain import chain_of
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.choice import ScheduleChoice
from stagewise.planning.plan import plan_of


@dataclass(frozen=True, kw_only=True)
class PipelinedStep:
    """The results of a pipelined step on this rank; `given`: the plain update by its gradients.

    `warnings`: what the step itself finds wrong with losses and cells.
    """

    tensors: Tensors
    given: dict[str, Tensor]
    warnings: tuple[str, ...]


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
    predicted: dict[object, Tensors],
) -> PipelinedStep:
    """Run one step of the pipelined model; `predicted` caches outputs across runs."""
    balance = _even(len(chain_of(subject.model)), choice.num_stages)
    plan = plan_of(choice, balance, recompute=recompute)

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
    with _heard() as texts:
        if key not in predicted:  # the same for every schedule and policy
            args, _, kwargs = _call(subject)
            predicted[key] = outputs_or_none(lambda: build().predict(*args, **kwargs))
        pipe = build()
        args, target, kwargs = _call(subject)
        loss = pipe.step(*args, target=target, **kwargs)
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
        tensors=predicted[key] | tensors,
        given=references.after_optimizer(subject, gradients, norm),
        warnings=tuple(texts),
    )


def _call(subject: Subject) -> tuple[tuple[object, ...], object, dict[str, Any]]:
    """Return a copy of the batch: positional arguments, target, and keyword arguments."""
    inputs, target, keywords = subject.fresh_call()
    return () if inputs is None else (inputs,), target, keywords


def _even(num_cells: int, num_stages: int) -> tuple[int, ...]:
    small, extra = divmod(num_cells, num_stages)
    return tuple(small + (stage < extra) for stage in range(num_stages))
