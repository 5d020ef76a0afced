"""Cells of which ranks beside the pipeline compute parts: tensors, sequences, experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from stagewise.costs import CellCost


@dataclass(frozen=True, kw_only=True)
class DividedCells:
    """What each cell costs a rank, with the exchanges inside it, and how much of that these are.

    `own_bytes` has, for each axis along which ranks have parts of the batch, the bytes of trained
    parameters that every rank along it has others of; `shared` are the axes without parts.
    """

    costs: tuple[CellCost, ...]
    exchange_seconds: tuple[float, ...] = ()  # forward and backward of a microbatch
    own_bytes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    @property
    def axes(self) -> frozenset[str]:
        """The axes whose work is in the costs."""
        return frozenset({*self.own_bytes, *self.shared})

    def own_by_stage(self, balance: Sequence[int]) -> Mapping[str, Sequence[int]]:
        """Return `own_bytes` of stages of so many cells each."""
        ends = [0, *accumulate(balance)]
        return {
            name: [sum(sizes[start:end]) for start, end in pairwise(ends)]
            for name, sizes in self.own_bytes.items()
        }


UNDIVIDED = DividedCells(costs=())
