"""How a loss is reduced, inferred from two parts of a batch and their whole.

Microbatches' losses are weighted by their reduction: a mean by the number of samples (or a weight),
a sum by 1. Whether that yields the plain model's loss shows in its gradients: those of the whole,
with respect to the samples of part i, are c_i times those of part i alone. (c_0, c_1) = (1, 1) is a
sum; c_0 + c_1 = 1 is a mean, by samples or by something else; if they are not a multiple, the loss
depends on the other samples of its batch (contrastive losses, statistics over the batch), and no
weighting of microbatches reproduces it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stagewise.batch.layouts import precise
from stagewise.batch.values import with_paths
from stagewise.model.added_losses import MAIN_LOSS

# Relative, of gradients; round-off in our models stays below a hundredth of it.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.2}

Kind = Literal["weighted", "mean", "sum", "mixed"]
SEVERITY: tuple[Kind, ...] = ("weighted", "mean", "sum", "mixed")
Losses = Callable[[object], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A loss that is weighted wrongly; `parts` and `whole` are its values.

    `counts` is what each part really contributes, if that can be inferred; `counted` the weights
    that are used.
    """

    name: str
    kind: Kind
    parts: tuple[float, float]
    whole: float
    counts: tuple[float, float] | None
    counted: tuple[float, float]


def examine(
    losses: Losses,
    parts: Sequence[object],
    whole: object,
    leaves: Sequence[Sequence[Tensor]],
    counted: Callable[[str], tuple[float, float]],
) -> Iterator[Examined]:
    """Yield the losses for which the weights `counted(name)` are wrong.

    `whole` consists of the two `parts`, whose `leaves` require gradients.
    """
    values = [losses(part) for part in parts]
    together = losses(whole)
    for name, total in together.items():
        own = [value[name] for value in values if name in value]
        if len(own) != 2 or not all(bool(loss.detach().isfinite()) for loss in (*own, total)):
            continue
        tolerance = max(_TOLERANCES.get(t.dtype, 1e-3) for t in (total, *leaves[0], *leaves[1]))
        counts = _counts(own, total, leaves, tolerance)
        numbers = float(own[0].detach()), float(own[1].detach())
        sum_of = float(total.detach())
        kind = _kind(counts, numbers, sum_of, counted(name), tolerance)
        if kind is not None:
            yield Examined(
                name=name,
                kind=kind,
                parts=numbers,
                whole=sum_of,
                counts=counts if isinstance(counts, tuple) else None,
                counted=counted(name),
            )


def losses_by_name(value: object) -> dict[str, Tensor]:
    """Return a loss or weight as numbers by name."""
    named = dict(value) if isinstance(value, Mapping) else {MAIN_LOSS: value}
    return {name: torch.as_tensor(number).reshape(()) for name, number in named.items()}


def scalars_of(output: object) -> dict[str, Tensor]:
    """Return the scalars in a cell's output (a model that computes its own loss), by place."""
    found = with_paths(output)
    return {
        p: x for p, x in found if isinstance(x, Tensor) and not x.dim() and x.is_floating_point()
    }


def _counts(
    own: Sequence[Tensor], total: Tensor, leaves: Sequence[Sequence[Tensor]], tolerance: float
) -> tuple[float, float] | Literal["mixed"] | None:
    """Return (c_0, c_1), "mixed" if there are none, or None if the gradients do not tell.

    Of a part without gradients (a hinge that is not reached), c is what a mean leaves for it.
    """
    if not (total.requires_grad and all(loss.requires_grad for loss in own)):
        return None
    found: list[float | None] = []
    for loss, inputs in zip(own, leaves, strict=True):
        alone, within = _gradient(loss, inputs), _gradient(total, inputs)
        square, size = float(alone @ alone), float(within.norm())
        if square == 0:
            if size > 0:
                return "mixed"
            found.append(None)
            continue
        count = float(alone @ within) / square
        if float((within - count * alone).norm()) > tolerance * max(size, abs(count) * square**0.5):
            return "mixed"
        found.append(count)
    first, second = found
    if first is None:
        return None if second is None else (1 - second, second)
    return first, 1 - first if second is None else second


def _gradient(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, list(inputs), retain_graph=True, allow_unused=True)
    parts = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(inputs, gradients, strict=True)
    ]
    real = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return torch.cat([precise(part.to_dense().reshape(-1)) for part in real])


def _kind(
    counts: tuple[float, float] | Literal["mixed"] | None,
    parts: tuple[float, float],
    whole: float,
    counted: tuple[float, float],
    tolerance: float,
) -> Kind | None:
    """Return how the loss is reduced; None if the weights are right, or nothing can be inferred."""

    def near(numbers: Sequence[float], others: Sequence[float]) -> bool:
        scale = tolerance * max(map(abs, (*numbers, *others)))
        return all(abs(a - b) <= scale for a, b in zip(numbers, others, strict=True))

    if counts == "mixed":
        return "mixed"
    if counts is None:  # from the values alone, if they differ enough
        scale = max(abs(whole), *map(abs, parts))
        if abs(whole - _sum(counted, parts)) <= 10 * tolerance * scale or scale == 0:
            return None
        if abs(whole - sum(parts)) <= tolerance * scale:
            return "sum"
        return None if min(parts) <= whole <= max(parts) else "mixed"
    by_value = abs(whole - _sum(counts, parts)) <= 10 * tolerance * max(
        abs(whole), *map(abs, parts)
    )
    if near(counts, counted):
        return None if by_value else "mixed"
    if near(counts, (1.0, 1.0)):
        return "sum"
    if near((sum(counts),), (1.0,)) and by_value:
        return "mean" if counted == (1.0, 1.0) else "weighted"
    return "mixed"


def _sum(counts: tuple[float, float], parts: tuple[float, float]) -> float:
    return counts[0] * parts[0] + counts[1] * parts[1]


Owner = Literal["function", "model", "cell"]  # who computes the loss
_REMEDIES: dict[tuple[Kind, Owner], str] = {
    ("sum", "function"): "give Pipeline loss_reduction='sum', or return a mean from the loss",
    ("sum", "model"): "give Pipeline loss_reduction='sum', or return a mean from the model",
    ("sum", "cell"): "add a mean over the microbatch's samples in the cell",
    ("weighted", "function"): (
        "give Pipeline a weight(target) that returns what a microbatch really counts: the number "
        "of targets that are not ignored, or the sum of their class weights"
    ),
    ("weighted", "model"): (
        "return the outputs from the model, and give Pipeline the loss function and a "
        "weight(target) that returns what a microbatch really counts: the number of targets that "
        "are not ignored, or the sum of their class weights"
    ),
    ("weighted", "cell"): "add a mean over the microbatch's samples in the cell",
}
_BY_ITSELF = (  # which all three values being equal may mean
    "or, if it is a loss divided by its own value, return that loss, and rescale gradients after "
    "the step"
)


def words(found: Examined, what: str, *, by: str, owner: Owner, fits: str | None = None) -> str:
    """Say what is wrong with the loss `what`, with its numbers and the remedy.

    It is weighted by `by`; `fits` is a weight that would be right here.
    """
    first, second = found.parts
    shown = (
        f"on two parts of the batch it is {first:.6g} and {second:.6g}, on both together "
        f"{found.whole:.6g}"
    )
    remedy = _REMEDIES.get((found.kind, owner), "")
    if found.kind == "sum":
        return (
            f"{what} is a sum over samples, but is weighted as a mean, so it comes out divided by "
            f"the number of microbatches: {shown}; {remedy}"
        )
    if found.kind == "mean":
        return (
            f"{what} is a mean over samples, but loss_reduction is 'sum', so it comes out "
            f"multiplied by the number of microbatches: {shown}; leave loss_reduction out"
        )
    if found.kind == "weighted":
        assert found.counts is not None
        return (
            f"{what} is a mean in which samples do not count equally: {shown}; its parts make up "
            f"{found.counts[0]:.4g} and {found.counts[1]:.4g} of the whole, but are weighted "
            f"{found.counted[0]:.4g} and {found.counted[1]:.4g}, by {by}; {remedy}"
            + (f"; here {fits} fits" if fits else "")
            + (f"; {_BY_ITSELF}" if first == second == found.whole else "")
        )
    return (
        f"{what} depends on the other samples of its batch (negatives, hard pairs, statistics over "
        "the batch, a division by its own value, a hook that rescales its gradient), so it is a "
        f"different loss in every microbatch: {shown}, which no weighting of the two gives; use "
        "num_microbatches=1, or a mean over samples, and rescale gradients after the step"
    )
