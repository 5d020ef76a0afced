"""The optimal partition for any placement, and what is proven about it.

The exact method depends on the placement: `cut_one_per_device`, `cut_two_per_device` (looped or V),
or for anything else `branch_and_bound` on a mixed-integer program. If the exact method would take
too long, the best cut found is returned with the proven lower bound, and not as optimal.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from stagewise.costs import CellCost, LinkCost, load_seconds, num_untrained
from stagewise.planning.partition.any_placement import improve_cuts
from stagewise.planning.partition.cut_costs import Layout, MemoryNeeds, balance_of, layout
from stagewise.planning.partition.integer_program import branch_and_bound
from stagewise.planning.partition.one_per_device import cut_one_per_device
from stagewise.planning.partition.two_per_device import (
    TooMuchWork,
    cut_two_per_device,
    has_two_per_device,
)
from stagewise.schedule import Schedule

_ROUNDING = 1e-9  # relative, HiGHS's tolerance
_MAX_CHOICES = 4_000  # boundaries times stages of a mixed-integer program


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Limits of the search for a cut.

    `max_nodes` limits branch and bound (0: skip it), `max_work` the states examined for two stages
    per device, `kicks` the attempts to leave a local optimum. A cut within `tolerance` of the lower
    bound is not improved further.
    """

    max_nodes: int = 2_000
    max_work: int = 20_000_000
    kicks: int = 20
    tolerance: float = 0


THOROUGH = Effort()


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A cut, its busiest device's seconds per microbatch, and a lower bound for all cuts."""

    balance: tuple[int, ...]
    seconds: float
    bound_seconds: float

    @property
    def gap(self) -> float:
        """Upper bound on the relative distance to the optimum; 0 if proven optimal."""
        return self.seconds / self.bound_seconds - 1 if self.bound_seconds else 0.0

    @property
    def is_optimal(self) -> bool:
        """Whether no better cut exists, up to rounding."""
        return self.gap <= _ROUNDING

    def __str__(self) -> str:
        return "optimal" if self.is_optimal else f"within {self.gap:.2%} of the bound"


def place(
    placement: Sequence[Sequence[int]],
    cell_seconds: Sequence[float],
    *,
    transfer_seconds: Sequence[float] | None = None,
    memory: MemoryNeeds | None = None,
    speeds: Sequence[float] = (),
    effort: Effort = THOROUGH,
) -> Partition | None:
    """Cut the chain into the stages of `placement` so that the busiest device has the least load.

    `placement[s]` are the devices of stage s; on r devices, each has 1/r of the stage's load.
    `transfer_seconds[i]`, one fewer than cells, is what the boundary after cell i costs each of its
    sides, unless both are on the same devices. `speeds` of the devices, of which the fastest has 1,
    are equal by default. Return None if no cut was found that fits `memory`;
    this is a proof that there is none, unless a device holds three or more stages.

    >>> place([(0,), (1,), (0,), (1,)], [3, 1, 1, 1, 1, 5]).balance
    (2, 2, 1, 1)
    """
    chain = layout(
        placement, cell_seconds, transfer_seconds=transfer_seconds, memory=memory, speeds=speeds
    )
    if chain.one_per_device:
        exact = cut_one_per_device(chain)
        return None if exact is None else _partition(chain, exact[1])
    start = improve_cuts(chain, _cut_ignoring_placement(chain), kicks=0)
    known, bound = chain.busiest_seconds(start), chain.least_seconds
    if known <= bound * (1 + _ROUNDING):
        return _partition(chain, start)
    if known <= bound * (1 + effort.tolerance):
        return _partition(chain, start, bound)
    if has_two_per_device(chain) and not chain.speeds:
        with suppress(TooMuchWork):
            better = cut_two_per_device(chain, known, effort.max_work)
            return _partition(chain, start if better is None else better[1])
    kicks = min(effort.kicks, 2) if known == float("inf") else effort.kicks
    kicks = min(kicks, 2_000 // chain.num_stages)
    start = improve_cuts(chain, start, kicks=kicks, tolerance=effort.tolerance)
    known = chain.busiest_seconds(start)
    if effort.max_nodes and chain.num_stages * chain.num_cells <= _MAX_CHOICES:
        cuts, proven = branch_and_bound(chain, known, effort.max_nodes)
        bound = max(bound, proven)
        if cuts is not None and chain.busiest_seconds(cuts) < known:
            start = cuts
    return _partition(chain, start, bound)


def _cut_ignoring_placement(chain: Layout) -> tuple[int, ...]:
    """Return the best cuts if every stage had its own device, without a memory cap."""
    found = cut_one_per_device(
        layout(
            [(stage,) for stage in range(chain.num_stages)],
            chain.cell_seconds.tolist(),
            transfer_seconds=chain.transfers[1:-1].tolist(),
        )
    )
    assert found is not None  # only a cap could leave none
    return found[1]


def _partition(
    chain: Layout, cuts: tuple[int, ...], bound: float = float("inf")
) -> Partition | None:
    """Return the cut, as optimal if no lower `bound` is given; None if it does not fit."""
    seconds = chain.busiest_seconds(cuts)
    if seconds == float("inf"):
        return None
    return Partition(balance=balance_of(cuts), seconds=seconds, bound_seconds=min(bound, seconds))


def best_balance(
    schedule: Schedule,
    cells: Sequence[CellCost],
    *,
    recompute: str,
    link: LinkCost,
    speeds: Sequence[float] = (),
) -> tuple[int, ...]:
    """Return the cut that minimises the load of the busiest device of `schedule`."""
    forwards, split = 1 if recompute == "never" else 2, schedule.splits_backward
    found = place(
        schedule.placement,
        [load_seconds(cell, forwards=forwards, split=split) for cell in cells],
        transfer_seconds=boundary_seconds(cells, link),
        speeds=speeds,
    )
    assert found is not None  # only a memory cap could leave none
    return found.balance


def boundary_seconds(cells: Sequence[CellCost], link: LinkCost) -> list[float]:
    """Return the transfer time, both ways, across the boundary after each cell but the last."""
    untrained = num_untrained(cells)
    return [
        link.transfer_seconds(cell.output_bytes)
        + (link.transfer_seconds(cell.gradient_bytes) if index >= untrained else 0)
        for index, cell in enumerate(cells[:-1])
    ]
