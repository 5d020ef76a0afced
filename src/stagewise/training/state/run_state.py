"""Everything that a run keeps on this rank, under names that do not depend on the partition.

It can be written into a checkpoint, and put back into another pipeline of the same model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stagewise.engine.transport.processes import is_first, own_rank
from stagewise.pipeline.pipeline import Pipeline
from stagewise.training.state import optimizer_state, schedules
from stagewise.training.state.own_objects import Objects, fill_objects, objects_state
from stagewise.training.state.plain_values import to_bytes
from stagewise.training.state.random_states import random_states

DATA = "state"


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What a checkpoint holds besides model, optimizer and random states, if anything.

    `objects` are the recipe's; `data` is the position (as bytes) of a stateful loader;
    `validation_loss` that of the same step.
    """

    scheduler: LRScheduler | None = None
    scaler: Mapping[str, float] = field(default_factory=dict)
    objects: Objects = field(default_factory=dict)
    data: torch.Tensor | None = None
    validation_loss: float | None = None


NOTHING = Extra()


def state_of_run(
    pipe: Pipeline, optimizer: Optimizer | None, extra: Extra
) -> dict[str, dict[str, Any]]:
    """Return this rank's part, under names that do not depend on the partition."""
    optimizer_part = (
        {}
        if optimizer is None
        else optimizer_state.state_of(optimizer, saved_names(pipe), own_rank())
    )
    generators = to_bytes(random_states(pipe.device), "the generators' state")
    return {
        "model": model_state(pipe),
        "optimizer": optimizer_part,
        "schedule": schedules.saved_state(extra.scheduler),
        **objects_state(extra.objects, pipe.state_names, own_rank()),
        "data": {DATA: extra.data} if extra.data is not None and is_first() else {},
        "random": {random_of(own_rank()): generators},
    }


def put_state_back(
    state: Mapping[str, Any], pipe: Pipeline, optimizer: Optimizer | None, extra: Extra
) -> None:
    """Restore what `state_of_run` returned, but for data and generators."""
    if state["model"]:
        set_model_state_dict(pipe.module, state["model"])
    if optimizer is not None:
        optimizer_state.fill_optimizer(optimizer, state["optimizer"], saved_names(pipe))
    if extra.scheduler is not None:
        schedules.put_back(extra.scheduler, state["schedule"])
    fill_objects(extra.objects, state)


def saved_names(pipe: Pipeline) -> dict[torch.nn.Parameter, str]:
    """Return the name of each of this rank's parameters."""
    return {parameter: name for name, parameter in pipe.named_parameters()}


def random_of(rank: int) -> str:
    """Return the entry of a rank's generators."""
    return f"rank{rank}"


def model_state(pipe: Pipeline) -> dict[str, Any]:
    """Return the module's state; torch does not accept an empty one."""
    return get_model_state_dict(pipe.module) if pipe.module.state_dict() else {}
