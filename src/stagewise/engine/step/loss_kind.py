"""What kind of loss it is, seen from two parts of a batch and both together.

A loss counts by microbatch as its reduction says: a mean by the number of samples (or a weight),
a sum as it is. Whether that gives the plain model's loss shows in its gradients: those of the
whole, for the samples of part i, are c_i times those of part i alone. (c_0, c_1) = (1, 1) is a sum;
c_0 + c_1 = 1 is a mean, by samples or by something else; where they are no multiple the loss
depends on the other samples of its batch (contrastive losses, statistics over the batch), and no
weighting of microbatches gives it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stagewise.batch.values import with_paths
from stagewise.model.added_losses import MAIN_LOSS

# Of gradients, relative; round-off in our models loses less than a hundredth of it.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.2}

Kind = Literal["weighted", "mean", "sum", "mixed"]
SEVERITY: tuple[Kind, ...] = ("weighted", "mean", "sum", "mixed")
Losses = Callable[[object], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A loss that counts otherwise than it should; `parts` and `whole` are its values.

    `counts` is what each part really counts for, where that can be told; `counted` what it is
    counted.
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
    """The losses, by name, that are not what they are `counted` for.

    `whole` is made of the two `parts`, whose `leaves` require gradients.
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
    """Numbers by name, of a loss or a weight."""
    named = dict(value) if isinstance(value, Mapping) else {MAIN_LOSS: value}
    return {name: torch.as_tensor(number).reshape(()) for name, number in named.items()}


def scalars_of(output: object) -> dict[str, Tensor]:
    """The numbers in a cell's output, as the loss of a model that computes its own, by place."""
    found = with_paths(output)
    return {
        p: x for p, x in found if isinstance(x, Tensor) and not x.dim() and x.is_floating_point()
    }


def _counts(
    own: Sequence[Tensor], total: Tensor, leaves: Sequence[Sequence[Tensor]], tolerance: float
) -> tuple[float, float] | Literal["mixed"] | None:
    """(c_0, c_1), or that there are none; None where no gradient tells."""
    if not (total.requires_grad and all(loss.requires_grad for loss in own)):
        return None
    found = []
    for loss, inputs in zip(own, leaves, strict=True):
        alone, within = _gradient(loss, inputs), _gradient(total, inputs)
        square, size = float(alone @ alone), float(within.norm())
        if square == 0:
            if size > 0:
                return "mixed"
            return None
        count = float(alone @ within) / square
        if float((within - count * alone).norm()) > tolerance * max(size, abs(count) * square**0.5):
            return "mixed"
        found.append(count)
    return found[0], found[1]


def _gradient(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, list(inputs), retain_graph=True, allow_unused=True)
    parts = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(inputs, gradients, strict=True)
    ]
    real = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return torch.cat([part.to_dense().reshape(-1).double() for part in real])


def _kind(
    counts: tuple[float, float] | Literal["mixed"] | None,
    parts: tuple[float, float],
    whole: float,
    counted: tuple[float, float],
    tolerance: float,
) -> Kind | None:
    """None where it is what it is counted for, or where nothing can be told."""

    def near(numbers: Sequence[float], others: Sequence[float]) -> bool:
        scale = tolerance * max(map(abs, (*numbers, *others)))
        return all(abs(a - b) <= scale for a, b in zip(numbers, others, strict=True))

    if counts == "mixed":
        return "mixed"
    if counts is None:  # by the values alone, where these differ enough to tell
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
    ("sum", "function"): "give Pipeline loss_reduction='sum', or let the loss return a mean",
    ("sum", "model"): "give Pipeline loss_reduction='sum', or let the model return a mean",
    ("sum", "cell"): "let the cell add a mean over the samples at hand",
    ("weighted", "function"): (
        "give Pipeline a weight(target) that returns what a microbatch really counts: the number "
        "of targets that are not ignored, or the sum of their class weights"
    ),
    ("weighted", "model"): (
        "let the model return its outputs, and give Pipeline the loss function and a "
        "weight(target) that returns what a microbatch really counts: the number of targets that "
        "are not ignored, or the sum of their class weights"
    ),
    ("weighted", "cell"): "let the cell add a mean over the samples at hand",
}


def words(found: Examined, what: str, *, by: str, owner: Owner, fits: str | None = None) -> str:
    """What is wrong with `what`, with its numbers and the remedy; it counts by `by`, and would be
    right here with what `fits`."""
    first, second = found.parts
    shown = (
        f"on two parts of the batch it is {first:.6g} and {second:.6g}, on both together "
        f"{found.whole:.6g}"
    )
    remedy = _REMEDIES.get((found.kind, owner), "")
    if found.kind == "sum":
        return (
            f"{what} is a sum over samples, but counts as a mean, so that it comes out divided by "
            f"the number of microbatches: {shown}; {remedy}"
        )
    if found.kind == "mean":
        return (
            f"{what} is a mean over samples, but loss_reduction is 'sum', so that it comes out "
            f"multiplied by the number of microbatches: {shown}; leave loss_reduction out"
        )
    if found.kind == "weighted":
        assert found.counts is not None
        return (
            f"{what} is a mean in which samples do not count alike: {shown}; its parts count for "
            f"{found.counts[0]:.4g} and {found.counts[1]:.4g} of the whole, but are counted as "
            f"{found.counted[0]:.4g} and {found.counted[1]:.4g}, by {by}; {remedy}"
            + (f"; here {fits} fits" if fits else "")
        )
    return (
        f"{what} depends on the other samples of its batch (negatives, hard pairs, statistics over "
        f"the batch), so that it is another loss in every microbatch: {shown}, which no weights "
        "make of the two; it needs num_microbatches=1, or to be a mean over samples"
    )
