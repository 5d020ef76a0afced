"""How far two tensors of a step are apart, on a scale where round-off is small."""

from collections.abc import Mapping

import torch
from torch import Tensor

# What is zero but for round-off (a bias before a norm) is measured by what stands beside it.
_FLOOR = 1e-2


def difference(quantity: str, ours: Tensor | None, reference: Mapping[str, Tensor | None]) -> float:
    """Largest absolute difference, relative to the reference's largest number.

    Infinite where one of the two is absent, has another shape, or holds a NaN.
    """
    theirs = reference.get(quantity)
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else float("inf")
    if ours.shape != theirs.shape:
        return float("inf")
    if torch.equal(ours, theirs) or not ours.numel():
        return 0.0
    scale = max(_largest(theirs), _FLOOR * _beside(quantity, reference))
    apart = torch.where(ours == theirs, 0.0, (ours.double() - theirs.double()).abs())
    relative = float(apart.max()) / scale if scale else float("inf")
    return relative if relative == relative else float("inf")


def identical(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Bit for bit, dtype included."""
    if ours is None or theirs is None:
        return ours is theirs
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _beside(quantity: str, reference: Mapping[str, Tensor | None]) -> float:
    """The largest number of what is of the same kind: all gradients, or one module's tensors."""
    kind, _, name = quantity.partition(" ")
    if kind not in ("gradient", "buffer", "parameter"):
        return 0.0
    group = "gradient " if kind == "gradient" else f"{kind} {name.rpartition('.')[0]}."
    return max(
        (
            _largest(tensor)
            for other, tensor in reference.items()
            if other.startswith(group) and tensor is not None and tensor.is_floating_point()
        ),
        default=0.0,
    )


def _largest(tensor: Tensor) -> float:
    """Of the finite numbers: a mask may hold infinities."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
