"""A Pipeline for a trainer's model, made from the first step that it has to run."""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.integrations.accumulated import Accumulated
from stagewise.integrations.pipeline_arguments import PipelineArguments
from stagewise.model.cells_of import chain_for
from stagewise.pipeline.pipeline import Pipeline
from stagewise.pipeline.plan_model import plan
from stagewise.planning.plan import Plan

Loss = Callable[[object, Any], torch.Tensor]


class Losing(Protocol):
    """A trainer that computes losses."""

    def loss_of_microbatch(self, output: object, target: Any) -> torch.Tensor:
        """Return a microbatch's loss, or its part of the loss."""


class Here(Protocol):
    """What a trainer knows of its process, as transformers' TrainingArguments do."""

    @property
    def world_size(self) -> int:
        """The number of processes."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""

    @property
    def seed(self) -> int:
        """From which dropout and the like are drawn."""


_TRAINERS: weakref.WeakValueDictionary[int, Losing] = weakref.WeakValueDictionary()


def loss_of(trainer: Losing) -> Loss:
    """Return a trainer's loss as a function that holds nothing of it.

    What a loss function holds is watched for state that it carries from batch to batch, but a
    trainer has its data and loggers.
    """
    number = id(trainer)
    _TRAINERS[number] = trainer

    def loss(output: object, target: Any) -> torch.Tensor:
        return _TRAINERS[number].loss_of_microbatch(output, target)

    return loss


def pipeline_for(
    model: nn.Module,
    args: Here,
    asked: PipelineArguments,
    step: Accumulated,
    loss: Loss,
    resumed: Plan | None,
    *,
    summed: bool = True,
) -> Pipeline:
    """Return a pipeline, for whose plan the steps of `loss` are measured; collective.

    `resumed` is the plan of the run that is resumed; `summed`: losses are added up over
    microbatches, as they are; else they are means, which count by the step's weight or by samples.
    """
    alone = args.world_size == 1
    used = asked.given_plan() or resumed
    if used is not None:
        chain_for(model, None, step.keywords, asked.cells)
    elif alone and (asked.num_stages or 1) == 1:
        cells = len(chain_for(model, None, step.keywords, asked.cells))
        used = Plan(balance=(cells,), num_microbatches=step.count, recompute=asked.recompute)
    else:
        used = plan(
            model,
            kwargs=step.keywords,
            target=step.target,
            loss=loss,
            num_stages=asked.num_stages,
            num_devices=None if asked.num_stages or alone else args.world_size,
            num_microbatches=step.count,
            schedule=asked.schedule,
            recompute=asked.recompute,
            balance=asked.balance,
            cells=asked.cells,
            device=args.device,
        )
    return Pipeline(
        model,
        used,
        loss=loss,
        weight=step.weight,
        loss_reduction="sum" if summed else "mean",
        seed=args.seed,
        devices=[args.device] * used.num_devices if alone else None,
        merge=_merged if summed else None,
    )


def _merged(outputs: list[object]) -> object:
    """Join the microbatches' outputs; a loss that was split is a sum."""

    def joined(*leaves: Any) -> object:
        if not isinstance(leaves[0], torch.Tensor):
            return leaves[0]
        return torch.cat(leaves) if leaves[0].dim() else torch.stack(leaves).sum(0)

    return pytree.tree_map(joined, *outputs) if len(outputs) > 1 else outputs[0]
