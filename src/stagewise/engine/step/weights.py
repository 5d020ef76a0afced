"""How much each microbatch's loss counts, known on every rank before anything runs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stagewise.engine.stage.work import OTHERS, Scaling
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import BatchError, PlanError

Number = float | torch.Tensor
_ROUNDING = 1e-5  # of a caller's total, which may be a float32 sum
Weight = Callable[..., Number | Mapping[str, Number]]


@dataclass(frozen=True)
class LossCount:
    """How losses are weighted: by `weight(target)`, as sums, or by samples."""

    weight: Weight | None = None
    sums: bool = False


BY_SAMPLES = LossCount()


def is_sum(loss: object, reduction: str | None, *, has_weight: bool) -> bool:
    """Return whether `loss` is a sum over samples: by `reduction`, else by its own attribute.

    PlanError if `reduction` is invalid or contradicts a weight.
    """
    if reduction is None:
        if isinstance(loss, functools.partial):
            own = loss.keywords.get("reduction")
        else:
            own = getattr(loss, "reduction", None) if isinstance(loss, nn.Module) else None
        return own == "sum" and not has_weight  # else the weights decide
    if reduction not in ("mean", "sum"):
        raise PlanError(
            f"loss_reduction is {reduction!r}; give 'mean' or 'sum', as the loss function reduces "
            "over the samples of a microbatch"
        )
    if reduction == "sum" and has_weight:
        raise PlanError(
            "loss_reduction='sum' and weight= were both given, but sums are added as they are; "
            "leave weight out, or let the loss return a weighted mean"
        )
    return reduction == "sum"


def check_scaling(scaling: Scaling, num_samples: int, *, has_weight: bool) -> None:
    """Raise BatchError if this step alone exceeds the totals it is said to be a part of."""
    total = scaling.total_samples
    if total is not None and total < num_samples:
        raise BatchError(
            f"total_samples is {total} but this step alone has {num_samples} samples; give the "
            "number of samples of all the steps that are accumulated"
        )
    if total is not None and has_weight and scaling.total_weight is None:
        raise BatchError(
            "total_samples was given to a Pipeline with a weight function, whose losses are "
            "weighted by it; give total_weight (and also total_samples, for losses of add_loss)"
        )
    if scaling.total_weight is not None and not has_weight:
        raise BatchError(
            "total_weight needs a Pipeline with a weight function; this one weighs by samples, so "
            "give total_samples"
        )
    if not (math.isfinite(scaling.gradient_scale) and scaling.gradient_scale > 0):
        raise BatchError(f"loss_scale is {scaling.gradient_scale}; give a positive number")


def agree_on_shares(
    ranks: Ranks,
    count: LossCount,
    targets: Sequence[object],
    total: float | Mapping[str, float] | None,
    source: int,
    sizes: Sequence[int],
) -> dict[str, tuple[float, ...]]:
    """Return the weights, per microbatch, of losses that are not weighted by samples.

    They come from rank `source`, which has the `targets`. BatchError on every rank if they cannot
    be used.
    """
    if count.weight is None:
        return {OTHERS: (1.0,) * len(sizes)} if count.sums else {}
    columns: dict[str, tuple[float, ...]] = {}
    problem: str | None = None
    if ranks.rank == source:
        try:
            columns = _columns([_numbers(count.weight(target)) for target in targets])
        except BatchError as error:
            problem = str(error)
        except Exception as error:
            problem = f"weight(target) failed: {type(error).__name__}: {error}"
    told = ranks.gather_all((columns, problem), "step: weights")
    parts, problems = zip(*(told[own[source]] for own in ranks.slices.pipelines), strict=True)
    if said := [problem for problem in problems if problem is not None]:
        raise BatchError(said[0])
    columns = parts[ranks.slices.data_index]
    for other in parts:
        _check_names(columns, other, "on another data rank")
    if isinstance(total, Mapping):
        _check_names(columns, total, "in total_weight")
    return {
        name: _shares(name, column, [w for part in parts for w in part[name]], total)
        for name, column in columns.items()
    }


def _check_names(columns: Mapping[str, object], others: Mapping[str, object], where: str) -> None:
    if set(others) != set(columns):
        raise BatchError(
            f"weight(target) names {sorted(columns)}, but the names {where} are {sorted(others)}; "
            "give one for each of the weights"
        )


def _numbers(weight: Number | Mapping[str, Number]) -> dict[str, float]:
    by_name = weight if isinstance(weight, Mapping) else {"": weight}
    return {name: float(number) for name, number in by_name.items()}


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    names = list(rows[0])
    if any(set(row) != set(names) for row in rows):
        raise BatchError(
            f"weight(target) names {sorted(names)} on the first microbatch but other losses on "
            "another; return the same names for every target"
        )
    return {name: tuple(row[name] for row in rows) for name in names}


def _shares(
    name: str,
    column: tuple[float, ...],
    every: Sequence[float],
    totals: float | Mapping[str, float] | None,
) -> tuple[float, ...]:
    """Return the shares of `column`; `every` has the weights of all data ranks, also these."""
    of = f" of {name!r}" if name else ""
    if not all(math.isfinite(weight) and weight >= 0 for weight in every):
        raise BatchError(
            f"the microbatches' weights{of} are {tuple(every)}; weight(target) must return a "
            "finite number of at least 0"
        )
    own = math.fsum(every)
    total = totals[name] if isinstance(totals, Mapping) else totals
    if total is None:
        total = own
    if total < own * (1 - _ROUNDING) or total == 0:
        raise BatchError(
            f"the minibatch's weights{of} sum to {own}, of a total of {total}; the total must be "
            "positive and cover all accumulated steps, so leave out a batch whose weights are all "
            "0, or give total_weight"
        )
    return tuple(weight / total for weight in column)
