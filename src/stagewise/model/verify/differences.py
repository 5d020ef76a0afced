"""Measure how far two tensors of a step are apart, on a scale where round-off is small."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

# A quantity that is zero up to round-off (a bias before a norm) is scaled by those beside it.
_FLOOR = 1e-2
# If all gradients are zero up to round-off (a norm after a norm), the loss gives the scale.
_LOSS_FLOOR = 1e-2


class Reference:
    """Tensors by quantity, each with its scale: roughly its largest number."""

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        self.tensors = dict(tensors)
        largest = {q: 0.0 if t is None else _largest(t) for q, t in self.tensors.items()}
        beside: dict[str, float] = defaultdict(float)
        beside["gradient"] = _LOSS_FLOOR * largest.get("loss", 0.0)
        for quantity, tensor in self.tensors.items():
            if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                group = _group(quantity)
                beside[group] = max(beside[group], largest[quantity])
        self._scales = {q: max(own, _FLOOR * beside[_group(q)]) for q, own in largest.items()}

    def difference(self, quantity: str, ours: Tensor | None) -> float:
        """Return the largest absolute difference, relative to the quantity's scale.

        Infinite if one of the two is absent, has another shape, or contains a NaN.
        """
        theirs = self.tensors.get(quantity)
        if ours is None or theirs is None:
            return 0.0 if ours is theirs else float("inf")
        if ours.shape != theirs.shape:
            return float("inf")
        if torch.equal(ours, theirs) or not ours.numel():
            return 0.0
        scale = self._scales[quantity]
        apart = torch.where(ours == theirs, 0.0, (_wide(ours) - _wide(theirs)).abs())
        relative = float(apart.max()) / scale if scale else float("inf")
        return relative if relative == relative else float("inf")


def identical(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Return whether both are equal bit for bit, dtype included."""
    if ours is None or theirs is None:
        return ours is theirs
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _group(quantity: str) -> str:
    """Return the group of a quantity: all gradients, or one module's buffers or parameters."""
    kind, _, name = quantity.partition(" ")
    if kind in ("buffer", "parameter"):
        return f"{kind} {name.rpartition('.')[0]}"
    return kind if kind == "gradient" else quantity


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _largest(tensor: Tensor) -> float:
    """Return the largest finite number: a mask may contain infinities."""
    finite = _wide(tensor[tensor.isfinite()])
    return float(finite.abs().max()) if finite.numel() else 0.0
