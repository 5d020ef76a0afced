"""Clip gradients by their norm over all ranks, or by value."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stagewise.batch.layouts import is_sharded
from stagewise.engine.gradients.shards import local_of, whole_norms
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError


def clip_by_global_norm(
    own: Sequence[tuple[str, torch.nn.Parameter]],
    dtypes: Mapping[str, torch.dtype],
    max_norm: float,
    ranks: Ranks,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale the gradients of `own` so that the norm over all ranks is at most `max_norm`.

    `dtypes` holds the whole model's parameter names in the plain model's order, in which the norms
    are summed at any number of stages: the result is bit for bit that of
    `torch.nn.utils.clip_grad_norm_` on the plain model. Returns the norm before clipping. Raises
    ModelError on every rank if `own` has a name that is not in `dtypes`, and torch's RuntimeError,
    if that is asked for, where the norm is no finite number.
    """
    norms = torch.zeros(len(dtypes), dtype=torch.float64, device="cpu")
    present = torch.zeros(len(dtypes), dtype=torch.int64, device="cpu")
    place = {name: index for index, name in enumerate(dtypes)}
    for places, together in _norms(own, place, norm_type):
        norms[places], present[places] = together, 1
    unknown = [name for name, _ in own if name not in place]
    row = [*norms.view(torch.int64).tolist(), *present.tolist(), len(unknown)]
    how = "" if norm_type == 2.0 else f", norm_type={float(norm_type)!r}"
    how += ", error_if_nonfinite=True" if error_if_nonfinite else ""
    rows = torch.tensor(
        ranks.exchange_all(row, f"clip_grad_norm_({float(max_norm)!r}{how})"),
        dtype=torch.int64,
        device="cpu",
    )
    rows, num_unknown = rows[:, :-1], rows[:, -1]
    if num_unknown.any():
        raise ModelError(
            f"{', '.join(unknown) or 'parameters of another rank'} were added after the Pipeline "
            "was built, so the norm over all ranks is unknown; change the model (parametrize it, "
            "add adapters) before building the Pipeline"
        )
    total = _total(rows, dtypes, norm_type)
    if total is None:
        return torch.tensor(0.0)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients of all ranks is {float(total)}, so it "
            "cannot be clipped; leave error_if_nonfinite out to scale by it all the same"
        )
    parts: Any = [_part(parameter) for _, parameter in own]
    torch.nn.utils.clip_grads_with_norm_(parts, max_norm, total, foreach)
    return total


def _total(
    rows: torch.Tensor, dtypes: Mapping[str, torch.dtype], norm_type: float
) -> torch.Tensor | None:
    """Return the norm of all ranks' gradients; None if there are none."""
    # The maximum, not the sum: a tied parameter has the same norm on each of its ranks.
    all_norms = rows[:, : len(dtypes)].view(torch.float64).amax(0)
    all_present = rows[:, len(dtypes) :].sum(0) > 0
    if not all_present.any():
        return None
    with_gradient = itertools.compress(dtypes.values(), all_present.tolist())
    dtype = functools.reduce(torch.promote_types, with_gradient)
    total: torch.Tensor = torch.linalg.vector_norm(all_norms[all_present].to(dtype), norm_type)
    return total


def _norms(
    own: Sequence[tuple[str, torch.nn.Parameter]], place: Mapping[str, int], norm_type: float
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield places and norms on the CPU, by device and dtype: one wait for each, not one a norm."""
    found: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    spread: list[tuple[int, torch.Tensor]] = []
    for name, parameter in own:
        if parameter.grad is None or name not in place:
            continue
        if is_sharded(parameter.grad):
            spread.append((place[name], parameter.grad))
        else:
            norm = torch.linalg.vector_norm(_elements(parameter.grad), norm_type)
            found.setdefault((norm.device, norm.dtype), []).append((place[name], norm))
    if spread:
        yield [at for at, _ in spread], whole_norms([g for _, g in spread], norm_type)
    for column in found.values():
        places, norms = zip(*column, strict=True)
        yield [*places], torch.stack(norms).cpu().double()


@torch.no_grad()
def clip_by_value(
    parameters: Iterable[nn.Parameter], max_value: float, *, foreach: bool | None = None
) -> None:
    """Clamp the elements of their gradients to [-max_value, max_value]."""
    dense = []
    for parameter in map(_part, parameters):
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            _elements(parameter.grad).clamp_(-max_value, max_value)
        elif parameter.grad is not None:
            dense.append(parameter)
    if dense:  # torch raises on an empty list
        torch.nn.utils.clip_grad_value_(dense, max_value, foreach)


class _Part(NamedTuple):
    """What torch's functions need of a parameter: this rank's part of the gradient."""

    grad: torch.Tensor


def _part(parameter: Any) -> Any:
    """Return a sharded parameter's part here, or the parameter itself."""
    gradient = parameter.grad
    return _Part(local_of(gradient)) if is_sharded(gradient) else parameter


def _elements(gradient: torch.Tensor) -> torch.Tensor:
    """Return the stored elements, each once."""
    return gradient.coalesce()._values() if gradient.is_sparse else gradient
