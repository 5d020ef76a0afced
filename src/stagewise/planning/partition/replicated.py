"""The optimal cut into replicated stages, and the devices of each (PipeDream's problem).

Problem: cut the chain and distribute the devices over the stages so that the busiest device has the
least load; on r devices, each has 1/r of the stage's work, and the memory depends on the number of
devices from this stage on. Idea: for a given bound on the load, the fewest devices that the rest of
the chain needs is a recurrence over the end of its first stage (fewer devices later are better for
both load and memory); bisection then finds the smallest bound that the devices allow.
Source: Narayanan et al., PipeDream, SOSP 2019, section 3.1; arXiv:2006.09503 for the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stagewise.errors import PlanError
from stagewise.planning.partition.cut_costs import Array, MemoryNeeds, balance_of, layout

Ints = NDArray[np.int64]

Balance = tuple[int, ...]
_PRECISION = 1e-12  # relative, of the bisection


@dataclass(frozen=True, kw_only=True)
class ReplicatedCut:
    """A cut into replicated stages, and the busiest device's seconds per microbatch."""

    balance: Balance
    replicas: tuple[int, ...]
    seconds: float


def replicated_partition(
    cell_seconds: Sequence[float],
    num_devices: int,
    *,
    transfer_seconds: Sequence[float] | None = None,
    memory: MemoryNeeds | None = None,
    num_microbatches: int | None = None,
    recomputed: bool = False,
) -> ReplicatedCut | None:
    """Return the exact cut and replicas that minimise the busiest device's load.

    With n devices from a stage of r devices on, each of these holds ceil(n / r) microbatches, at
    most its share of `num_microbatches`; if `recomputed`, only one of them with its graph.
    `memory.inputs` and `memory.graphs` are ignored. Return None if nothing fits the memory.

    >>> replicated_partition([1, 4, 1], 3)
    ReplicatedCut(balance=(3,), replicas=(3,), seconds=2.0)
    """
    if num_devices < 1:
        raise PlanError(f"num_devices is {num_devices}; it must be at least 1")
    chain = layout([(0,)], cell_seconds, transfer_seconds=transfer_seconds)
    problem = _Problem(
        prefix=chain.prefix,
        transfers=chain.transfers,
        num_devices=num_devices,
        num_microbatches=num_microbatches or num_devices * num_devices,
        needs=None if memory is None else _Needs(memory, recomputed),
    )
    low, high = 0.0, float(problem.prefix[-1] + 2 * problem.transfers.max()) * 2 + 1e-300
    best = problem.within(high)
    if best is None:
        return None
    high = best.seconds
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        found = problem.within(middle)
        if found is None:
            low = middle
        else:
            best, high = found, min(found.seconds, middle)
    return best


class _Needs:
    """The memory of stages that begin with cell i, as a function of their end."""

    def __init__(self, memory: MemoryNeeds, recomputed: bool) -> None:
        self._state, self._kept = (
            np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
            for values in (memory.state, memory.kept)
        )
        self._entering, self._closing = memory.entering, np.asarray(memory.closing)
        caps = memory.memory_bytes  # which stage a device will hold is not known yet
        self._most = min(caps) if isinstance(caps, Sequence) else caps
        self._recomputed = recomputed

    def fit(self, i: int, ends: Ints, held: Ints) -> NDArray[np.bool_]:
        """Return whether a device can hold the cells i to end - 1 with `held` microbatches."""
        graph = self._kept[ends] - self._kept[i] + self._closing[ends]
        inputs = held * self._entering[i]
        held_graphs = graph if self._recomputed else held * graph
        fits: NDArray[np.bool_] = (
            self._state[ends] - self._state[i] + inputs + held_graphs <= self._most
        )
        return fits


@dataclass(frozen=True, kw_only=True)
class _Problem:
    prefix: Array
    transfers: Array
    num_devices: int
    num_microbatches: int
    needs: _Needs | None

    def within(self, bound: float) -> ReplicatedCut | None:
        """Return the cut with the fewest devices whose loads are at most `bound`, or None."""
        num_cells = len(self.prefix) - 1
        never = self.num_devices + 1
        fewest = np.full(num_cells + 1, never)
        fewest[num_cells] = 0
        nexts, shares = np.zeros(num_cells, dtype=np.int64), np.zeros(num_cells, dtype=np.int64)
        for i in reversed(range(num_cells)):
            ends = i + 1 + np.flatnonzero(fewest[i + 1 :] < never)
            if not len(ends):
                return None
            share = self._replicas(i, ends, fewest[ends], bound)
            total = share + fewest[ends]
            best = int(total.argmin())
            if total[best] <= self.num_devices:
                fewest[i], nexts[i], shares[i] = total[best], ends[best], share[best]
        if fewest[0] > self.num_devices:
            return None
        cuts, replicas = [0], []
        while cuts[-1] < num_cells:
            replicas.append(int(shares[cuts[-1]]))
            cuts.append(int(nexts[cuts[-1]]))
        seconds = max(
            self._load(a, b) / r for (a, b), r in zip(pairwise(cuts), replicas, strict=True)
        )
        return ReplicatedCut(balance=balance_of(cuts), replicas=tuple(replicas), seconds=seconds)

    def _load(self, i: int, end: int) -> float:
        alone = self.prefix[end] - self.prefix[i]
        return float(alone + self.transfers[i] + self.transfers[end])

    def _replicas(self, i: int, ends: Ints, behind: Ints, bound: float) -> Ints:
        """Return the fewest devices for stages from cell i to `ends`; num_devices + 1 if none."""
        loads = self.prefix[ends] - self.prefix[i] + self.transfers[i] + self.transfers[ends]
        never = self.num_devices + 1
        most = min(never, self.num_microbatches + 1)
        share: Ints = np.minimum(np.ceil(loads / bound), most).astype(np.int64).clip(1)
        share[loads > bound * share] += 1  # if the division was rounded down
        while self.needs is not None:
            rounds = -(-self.num_microbatches // share)
            held = np.minimum(-(-(share + behind) // share), rounds)
            lacking = (share < most) & ~self.needs.fit(i, ends, held)
            if not lacking.any():
                break
            share[lacking] += 1
        share[share >= most] = never
        return share
