"""The learning-rate schedule of a run: one on every rank, saved and resumed with it.

A recipe's `scheduler(optimizer)` makes it; it steps once after every training step, or, if it waits
for a metric, after every due validation, of which all ranks know the same numbers. Its state is
saved as one entry. Lists per parameter group are not restored from it but from the optimizer,
because with another number of stages a rank may have other groups.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from stagewise.errors import CheckpointError, RecipeError
from stagewise.training.state.plain_values import from_bytes, room_for_bytes, to_bytes

_ENTRY = "state"


def saved_state(scheduler: LRScheduler | None) -> dict[str, torch.Tensor]:
    """Return the schedule's state as one tensor of bytes; nothing without a schedule."""
    if scheduler is None:
        return {}
    what = f"the state of {type(scheduler).__name__}"
    return {_ENTRY: to_bytes(scheduler.state_dict(), what)}


def room_in(
    index: Metadata, section: str, scheduler: LRScheduler | None
) -> dict[str, torch.Tensor]:
    """Return an empty tensor to read into; raise CheckpointError if the checkpoint has none."""
    if scheduler is None:
        return {}
    room = room_for_bytes(index, f"{section}.{_ENTRY}")
    if room is None:
        raise CheckpointError(
            "it was written without a learning-rate schedule, but the recipe has scheduler(); "
            "resume with the recipe that wrote it, or start again without --resume"
        )
    return {_ENTRY: room}


def put_back(scheduler: LRScheduler, saved: dict[str, torch.Tensor]) -> None:
    """Restore what `saved_state` returned; the optimizer must have been restored before."""
    read = from_bytes(saved[_ENTRY])
    scheduler.load_state_dict(_merged(read, scheduler.state_dict()))
    groups, rates = scheduler.optimizer.param_groups, read.get("_last_lr", [])
    for group, rate in zip(groups, rates, strict=False):
        if not group["params"] and len(rates) == len(groups):  # no parameter restored its options
            group["lr"] = rate
    for each in _parts(scheduler):
        if "base_lrs" in vars(each):  # a composition has none
            each.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
        each._last_lr = [group["lr"] for group in groups]


def _parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield the schedule and those that it is composed of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def waits_for_metric(scheduler: LRScheduler | None) -> bool:
    """Return whether it is stepped with a number of a validation."""
    return isinstance(scheduler, ReduceLROnPlateau)


def check_heard(path: Path, scheduler: LRScheduler | None, *, validates: bool) -> None:
    """Raise RecipeError for a schedule that waits for a metric of validations that never come."""
    if waits_for_metric(scheduler) and not validates:
        raise RecipeError(
            f"scheduler(optimizer) in {path} returned a {type(scheduler).__name__}, which is "
            "stepped with a metric after every due validation, but there is none: let "
            "data('validation') return batches, and give a --validate-every greater than 0"
        )


def check_saved(optimizer: Optimizer | None, scheduler: LRScheduler | None) -> None:
    """Raise CheckpointError if an optimizer has a schedule that would not be saved."""
    if optimizer is not None and scheduler is None and is_scheduled(optimizer):
        raise CheckpointError(
            "the optimizer has a learning-rate schedule (torch.optim.lr_scheduler) that the "
            "checkpoint would not include, so a resumed run would restart it; in a recipe return "
            "it from scheduler(optimizer), in a script pass scheduler=... to save and restore"
        )


def is_scheduled(optimizer: Optimizer) -> bool:
    """Return whether a torch scheduler is attached to `optimizer`, whose step it wraps."""
    return bool(getattr(optimizer.step, "_wrapped_by_lr_sched", False))


def _merged(saved: Any, own: Any) -> Any:
    """Return `saved`, but with the lists of `own`.

    Lists are per parameter group, which may differ from those of the rank that wrote them, or
    never change.
    """
    if isinstance(saved, dict) and isinstance(own, dict):
        return {key: _merged(value, own.get(key)) for key, value in saved.items()}
    if isinstance(saved, list) and isinstance(own, list):
        if saved and all(isinstance(each, dict) for each in (*saved, *own)):
            return [_merged(one, other) for one, other in zip(saved, own, strict=True)]
        return own
    return saved
