"""The end of the last stage: a microbatch's losses, and the gradients that start its backward."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stagewise.batch.objects import opened
from stagewise.batch.values import detached
from stagewise.engine.stage.flight import Flight
from stagewise.engine.stage.work import OTHERS, Mode, Work
from stagewise.errors import BatchError
from stagewise.model.added_losses import MAIN_LOSS, AddedLoss

Loss = Callable[..., torch.Tensor | Mapping[str, torch.Tensor]]


def takes_target(loss: Loss) -> bool:
    """Return whether `loss` takes a second positional argument, by its signature."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return True
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return several or sum(p.kind in by_position for p in parameters) > 1


def share_of(work: Work, name: str, m: int) -> float:
    """Return the weight of the loss `name` of microbatch m."""
    shares = work.shares
    return shares.get(name, shares.get(OTHERS, work.by_samples))[m]


def end(
    loss: Loss | None,
    output: object,
    flight: Flight,
    m: int,
    work: Work,
    device: torch.device,
    *,
    keeps: bool,
) -> object:
    """Finish the last stage: record the output if it is kept, compute and record the losses."""
    if work.mode is Mode.PREDICT:
        work.record.outputs[m] = output
        return opened(output)
    if keeps:
        work.record.outputs[m] = detached(output)
    losses = losses_of(loss, output, m, work, device)
    if not losses:
        return output
    flight.names, roots = tuple(losses), tuple(losses.values())  # one may be a root twice
    return roots if len(roots) == 1 else tuple(root[...] for root in roots)


def losses_of(
    loss: Loss | None, output: object, m: int, work: Work, device: torch.device
) -> dict[str, torch.Tensor]:
    """Compute microbatch m's losses by name, and record them detached.

    Without a loss function the output has the loss (`own_loss`). Returns {} if every loss has
    weight 0 (a mean over nothing would be NaN).
    """
    shares = work.shares
    if OTHERS in shares and not any([column[m] for column in shares.values()]):
        return {}
    if work.look is not None and loss is not None and m not in work.record.losses:
        loss = work.look.loss(loss, m, work.again(device))
    value = own_loss(output) if loss is None else loss(output, *work.parts.targets[m : m + 1])
    by_name = value if isinstance(value, Mapping) else {MAIN_LOSS: value}
    if not by_name:
        raise BatchError("the loss function returned an empty dict; return at least one loss")
    for name, one in by_name.items():
        if not isinstance(one, torch.Tensor) or one.numel() != 1:
            raise _not_a_number(name, one, has_loss=loss is not None)
        if work.mode is Mode.TRAIN and not one.is_floating_point():
            raise BatchError(
                f"the {name} must be a real number to have a gradient, but its dtype is {one.dtype}"
            )
    losses = dict(by_name)
    work.record.losses[m] = {name: one.detach() for name, one in losses.items()}
    return losses


def own_loss(output: object) -> object:
    """Return the loss of a model that computes it: its output, or the entry `loss` among others.

    transformers' models return the latter if they are given labels.
    """
    if isinstance(output, Mapping) and isinstance(output.get(MAIN_LOSS), torch.Tensor):
        return output[MAIN_LOSS]
    return output


def seeds_of(flight: Flight, m: int, work: Work) -> list[torch.Tensor | None]:
    """Return the gradient of each loss (the flight's ends): its weight, or None if that is 0.

    A microbatch without losses ends at its outputs, which get zeros.
    """
    if not flight.names:
        return list(map(torch.zeros_like, flight.ends))
    seeds: list[torch.Tensor | None] = []
    for name, loss in zip(flight.names, flight.ends, strict=True):
        share = share_of(work, name, m)
        seeds.append(torch.full_like(loss, share * work.gradient_scale) if share else None)
    return seeds


def add_seeds(
    added: Sequence[AddedLoss],
    m: int,
    work: Work,
    roots: list[GradientEdge],
    seeds: list[torch.Tensor],
) -> None:
    """Let the backward of microbatch m also start from the losses that its cells added."""
    for loss in added:
        if loss.value.requires_grad:
            roots.append(get_gradient_edge(loss.value))
            seeds.append(torch.full_like(loss.value, work.by_samples[m] * work.gradient_scale))


def record_added(added: Sequence[AddedLoss], m: int, work: Work) -> None:
    """Record the losses that cells added, detached; BatchError if their weight is unknown."""
    if not work.can_add_losses:
        raise BatchError(
            "total_weight was given, but a cell adds a loss with add_loss, which is weighted by "
            "samples; give total_samples too"
        )
    own = work.record.added.setdefault(m, [])
    own += [replace(loss, value=loss.value.detach()) for loss in added]


def _not_a_number(name: str, loss: object, *, has_loss: bool) -> BatchError:
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
    remedy = "return a mean from the loss function" if has_loss else "give Pipeline a loss function"
    return BatchError(
        f"the {name} must be one number, a mean over the samples, or a dict of such numbers, "
        f"but it is {got}; {remedy}"
    )
