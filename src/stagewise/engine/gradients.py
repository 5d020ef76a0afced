"""Gradients of the whole model, spread over ranks."""

import functools
import itertools
from collections.abc import Mapping

import torch

from stagewise.engine.transport import Transport


def clip_by_global_norm(
    own: Mapping[str, torch.nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    max_norm: float,
    transport: Transport,
) -> torch.Tensor:
    """Scale the gradients of `own` so that the norm over all ranks is at most `max_norm`.

    `dtypes` names the whole model's parameters in the plain model's order, so that the norms are
    summed in that order at any number of stages: the result is bit for bit that of
    `torch.nn.utils.clip_grad_norm_` on the plain model. Returns the norm before clipping.
    """
    norms = torch.zeros(len(dtypes), dtype=torch.float64)
    present = torch.zeros(len(dtypes), dtype=torch.int64)
    place = {name: index for index, name in enumerate(dtypes)}
    for name, parameter in own.items():
        if parameter.grad is not None:
            norms[place[name]] = torch.linalg.vector_norm(parameter.grad).double()
            present[place[name]] = 1
    row = [*norms.view(torch.int64).tolist(), *present.tolist()]
    rows = torch.tensor(transport.exchange(row), dtype=torch.int64)
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
