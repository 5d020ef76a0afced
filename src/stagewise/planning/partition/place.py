"""The optimal partition for any placement, and what is proven about it.

Which method is exact depends on the placement: one stage a device (`contiguous`), two
(`cut_two_per_device`: looped or a V), anything else (`branch_and_bound`, a mixed-integer
programme). Where the exact one would take too long, what was found stands beside the bound that
was proven, never as optimal.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from stagewise.planning.partition.any_placement import branch_and_bound, descend
from stagewise.planning.partition.one_per_device import contiguous
from stagewise.planning.partition.problem import Layout, MemoryNeeds, balance_of, layout
from stagewise.planning.partition.two_per_device import (
    TooMuchWork,
    cut_two_per_device,
    has_two_per_device,
)

_ROUNDING = 1e-9  # relative; of HiGHS's tolerances
_MAX_CHOICES = 4_000  # boundaries times stages of a mixed-integer programme


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A cut, its busiest device's seconds per microbatch, and a bound that no cut can beat."""

    balance: tuple[int, ...]
    seconds: float
    bound_seconds: float

    @property
    def gap(self) -> float:
        """By how much the cut is at most slower than the best one; 0 where it is proven best."""
        return self.seconds / self.bound_seconds - 1 if self.bound_seconds else 0.0

    @property
    def is_optimal(self) -> bool:
        """Whether no better cut exists (to rounding)."""
        return self.gap <= _ROUNDING

    def __str__(self) -> str:
        return "optimal" if self.is_optimal else f"within {self.gap:.2%} of the bound"


def place(
    placement: Sequence[Sequence[int]],
    cell_seconds: Sequence[float],
    *,
    transfer_seconds: Sequence[float] | None = None,
    memory: MemoryNeeds | None = None,
    max_nodes: int = 2_000,
    max_work: int = 20_000_000,
    kicks: int = 20,
    tolerance: float = 0,
) -> Partition | None:
    """Cut the chain into the stages of `placement` so that the busiest device has least to do.

    `placement[s]` are the devices of stage s; a stage on r devices gives each 1/r of its load.
    `transfer_seconds[i]`, one fewer than cells, is what the boundary behind cell i costs each of
    its sides, but where both lie on the same devices. None if nothing was found that fits
    `memory`; that is proven, but where devices hold three stages or more.

    `max_nodes` limits the branch and bound of those (0 leaves it out), `max_work` the states that
    are looked at for two stages a device, `kicks` the tries to leave a local optimum; and a cut
    within `tolerance` of the bound is not improved. The result's gap says what is known of it.

    >>> place([(0,), (1,), (0,), (1,)], [3, 1, 1, 1, 1, 5]).balance
    (2, 2, 1, 1)
    """
    chain = layout(placement, cell_seconds, transfer_seconds=transfer_seconds, memory=memory)
    if chain.alone:
        exact = contiguous(chain)
        return None if exact is None else _found(chain, exact[1])
    start = descend(chain, _one_stage_each(chain), kicks=0)
    known, bound = chain.busiest_seconds(start), chain.least_seconds
    if known <= bound * (1 + _ROUNDING):
        return _found(chain, start)
    if known <= bound * (1 + tolerance):
        return _found(chain, start, bound)
    if has_two_per_device(chain):
        with suppress(TooMuchWork):
            better = cut_two_per_device(chain, known, max_work)
            return _found(chain, start if better is None else better[1])
    if known == float("inf"):
        kicks = min(kicks, 2)
    start = descend(chain, start, kicks=min(kicks, 2_000 // chain.num_stages), tolerance=tolerance)
    known = chain.busiest_seconds(start)
    if max_nodes and chain.num_stages * chain.num_cells <= _MAX_CHOICES:
        cuts, proven = branch_and_bound(chain, known, max_nodes)
        bound = max(bound, proven)
        if cuts is not None and chain.busiest_seconds(cuts) < known:
            start = cuts
    return _found(chain, start, bound)


def _one_stage_each(chain: Layout) -> tuple[int, ...]:
    """The best cuts if every stage had a device for itself, without a cap."""
    found = contiguous(
        layout(
            [(stage,) for stage in range(chain.num_stages)],
            chain.cell_seconds.tolist(),
            transfer_seconds=chain.transfers[1:-1].tolist(),
        )
    )
    assert found is not None  # only a cap could leave none
    return found[1]


def _found(chain: Layout, cuts: tuple[int, ...], bound: float = float("inf")) -> Partition | None:
    """The cut, proven best unless a lower `bound` is all that is known; None if it does not fit."""
    seconds = chain.busiest_seconds(cuts)
    if seconds == float("inf"):
        return None
    return Partition(balance=balance_of(cuts), seconds=seconds, bound_seconds=min(bound, seconds))
