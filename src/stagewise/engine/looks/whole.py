"""Compare what a cell returns for a whole with what it returns for the parts, joined."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stagewise.batch.pairing import ways_together

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative to the largest element; others:
COARSE = 0.1
OF_GRADIENTS = {1e-8: 1e-6, 1e-3: 1e-2, COARSE: 0.3}


@dataclass(frozen=True)
class Division:
    """How a whole is divided: the parts' numbers of samples, and the dimension of these."""

    sizes: tuple[int, ...]
    batch_dim: int

    def ways(self, parts: Sequence[Tensor], whole: Tensor) -> Iterator[Tensor]:
        """Yield the ways of joining `parts` that give a tensor of the shape of `whole`."""
        return ways_together(parts, whole.shape, self.sizes, self.batch_dim)


@dataclass(frozen=True)
class Column:
    """One tensor of the outputs: the parts' and the whole's, and the ways of joining the parts'.

    `nearest` is the index of the way that gives the whole's, if any does.
    """

    parts: Sequence[Tensor]
    whole: Tensor
    ways: Sequence[Tensor]
    nearest: int | None

    @property
    def differs(self) -> bool:
        """Whether no way of joining the parts' gives the whole's."""
        if not self.whole.is_floating_point() or self.nearest is not None:
            return False
        if self.ways or any(self.whole.shape == part.shape for part in self.parts):
            return bool(self.ways)
        sizes = [*zip(*(part.shape for part in self.parts), self.whole.shape, strict=False)]
        grown = [sum(size) == both for *size, both in sizes if size[0] != both]
        same_dims = self.parts[0].dim() == self.whole.dim()
        return same_dims and len(grown) > 1 and all(grown)  # samples by samples


def columns(
    every: Sequence[Sequence[Tensor]], division: Division, tolerance: float
) -> list[Column]:
    """Compare the tensors of all parts and, last, of the whole."""
    if len({*map(len, every)}) > 1:  # other ways through the code: compare the last of each
        every = [[t for t in own if t.is_floating_point()][-1:] for own in every]
    found = []
    for *parts, whole in zip(*every, strict=True):
        ways = [*division.ways(parts, whole)] if whole.is_floating_point() else []
        nearest = (i for i, way in enumerate(ways) if near(way, whole, tolerance))
        found.append(Column(parts, whole, ways, next(nearest, None)))
    return found


def near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether two tensors are equal, but for `tolerance` times the largest element."""
    atol = tolerance * float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=atol, equal_nan=True)


def tolerance_of(tensor: Tensor) -> float:
    """Return the relative tolerance of what is computed from it; 0 if it is no float."""
    return _TOLERANCES.get(tensor.dtype, COARSE) if tensor.is_floating_point() else 0.0
