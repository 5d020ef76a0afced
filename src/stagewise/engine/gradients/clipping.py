"""Gradients: their form, adding them up as autograd does, and their norm over all ranks."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from stagewise.engine.stage.gradient import taken
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError


@contextmanager
def gradients_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Run inside without gradients; afterwards they are what they were."""
    before = [(parameter, taken(parameter)) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def clip_by_global_norm(
    own: Mapping[str, torch.nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    max_norm: float,
    ranks: Ranks,
) -> torch.Tensor:
    """Scale the gradients of `own` so that the norm over all ranks is at most `max_norm`.

    `dtypes` names the whole model's parameters in the plain model's order, so that the norms are
    summed in that order at any number of stages: the result is bit for bit that of
    `torch.nn.utils.clip_grad_norm_` on the plain model. Returns the norm before clipping. Raises
    ModelError on every rank if `own` holds names that `dtypes` has not.
    """
    norms = torch.zeros(len(dtypes), dtype=torch.float64)
    present = torch.zeros(len(dtypes), dtype=torch.int64)
    place = {name: index for index, name in enumerate(dtypes)}
    for name, parameter in own.items():
        if parameter.grad is not None and name in place:
            norms[place[name]] = torch.linalg.vector_norm(_elements(parameter.grad)).double()
            present[place[name]] = 1
    unknown = [name for name in own if name not in place]
    row = [*norms.view(torch.int64).tolist(), *present.tolist(), len(unknown)]
    rows = torch.tensor(
        ranks.exchange(row, f"clip_grad_norm_({float(max_norm)!r})"), dtype=torch.int64
    )
    rows, num_unknown = rows[:, :-1], rows[:, -1]
    if num_unknown.any():
        raise ModelError(
            f"{', '.join(unknown) or 'parameters of another rank'} came after the Pipeline was "
            "built, so no norm over all ranks is known; change the model (parametrize it, add "
            "adapters) first and then build the Pipeline"
        )
    # The maximum, not the sum: a tied parameter has the same norm on each of its ranks.
    all_norms = rows[:, : len(dtypes)].view(torch.float64).amax(0)
    all_present = rows[:, len(dtypes) :].sum(0) > 0
    if not all_present.any():
        return torch.tensor(0.0)
    with_gradient = itertools.compress(dtypes.values(), all_present.tolist())
    dtype = functools.reduce(torch.promote_types, with_gradient)
    total: torch.Tensor = torch.linalg.vector_norm(all_norms[all_present].to(dtype))
    torch.nn.utils.clip_grads_with_norm_(own.values(), max_norm, total)
    return total


@torch.no_grad()
def clip_by_value(parameters: Iterable[nn.Parameter], max_value: float) -> None:
    """Clamp the elements of their gradients to [-max_value, max_value]."""
    dense = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            _elements(parameter.grad).clamp_(-max_value, max_value)
        elif parameter.grad is not None:
            dense.append(parameter)
    if dense:  # torch fails on none
        torch.nn.utils.clip_grad_value_(dense, max_value)


def _elements(gradient: torch.Tensor) -> torch.Tensor:
    """Its elements that need not be 0, each once."""
    return gradient.coalesce()._values() if gradient.is_sparse else gradient
