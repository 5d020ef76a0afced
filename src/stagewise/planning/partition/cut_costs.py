"""What a cut of the chain costs on a placement: the arrays that all partitioners read.

Problem: a device may hold several stages, or a replica of one, and its memory may be capped. Idea:
with prefix sums, a stage's seconds and bytes are a term of its end minus a term of its start, so
every objective and cap is a sum of such terms, whatever the algorithm.

    seconds of stage s with cells a to b - 1 = ends[s, b] - starts[s, a]

One of r replicas takes every r-th microbatch, so it counts 1/r of the stage's seconds; on a device
of speed v, of which the fastest has 1, they count 1/v. A boundary costs both its stages its
transfer time, unless they are on the same devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stagewise.costs import CellCost, state_bytes
from stagewise.errors import PlanError
from stagewise.planning.partition.balance import check_counts

Array = NDArray[np.float64]
Placement = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """Bytes per cell, how many microbatches of each stage are held, and the cap per device.

    A stage of cells a to b - 1 that holds the inputs of `inputs[s]` microbatches and the
    activations of `graphs[s]` needs the `state` of its cells, `inputs[s] * entering[a]`, and
    `graphs[s]` times the sum of the `kept` of its cells and `closing[b]`.
    """

    memory_bytes: float | Sequence[float]  # of every device, or of each
    state: Sequence[float]  # parameters, gradients and optimizer state
    kept: Sequence[float]  # per cell, without what only the last cell of a stage keeps
    entering: Sequence[float]  # one more than cells: what crosses the boundary before cell i
    closing: Sequence[float]  # one more than cells: what cell i - 1 adds as the last of a stage
    inputs: Sequence[int]  # per stage
    graphs: Sequence[int]  # per stage
    # One more than cells: rooms of what crosses the boundary before cell i, and of what comes back.
    arriving: Sequence[float] = (0,)
    returning: Sequence[float] = (0,)


def memory_needs(
    cells: Sequence[CellCost],
    *,
    memory_bytes: float | Sequence[float],
    inputs: Sequence[int],
    graphs: Sequence[int],
    state_factor: float = 4,
    posted: int = 0,
) -> MemoryNeeds:
    """Return memory needs as `costs.stage_costs` and `Timeline.activation_bytes` count them.

    `inputs[s]` microbatches of stage s are in flight, `graphs[s]` of them with their graph. On
    every link `posted` messages have room.
    """
    return MemoryNeeds(
        memory_bytes=memory_bytes,
        state=[state_bytes(cell, state_factor) for cell in cells],
        kept=[cell.activation_bytes - cell.unsaved_output_bytes for cell in cells],
        entering=[0, *(cell.output_bytes for cell in cells)],
        closing=[0, *(cell.unsaved_output_bytes - cell.released_output_bytes for cell in cells)],
        inputs=inputs,
        graphs=graphs,
        arriving=[0, *(posted * cell.output_bytes for cell in cells)],
        returning=[0, *(posted * cell.gradient_bytes for cell in cells)],
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A chain to be cut into the stages of `placement`; starts and ends are (stages, cells + 1)."""

    placement: Placement
    cell_seconds: Array
    transfers: Array  # cells + 1; 0 at both ends
    starts: Array
    ends: Array
    memory_bytes: float = float("inf")
    start_bytes: Array = field(default_factory=lambda: np.zeros((0, 0)))
    end_bytes: Array = field(default_factory=lambda: np.zeros((0, 0)))
    speeds: tuple[float, ...] = ()  # of the devices; empty: all are equal

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_cells(self) -> int:
        return len(self.cell_seconds)

    @property
    def capped(self) -> bool:
        return bool(np.isfinite(self.memory_bytes))

    @cached_property
    def prefix(self) -> Array:
        """The seconds of the first i cells."""
        return np.concatenate([[0.0], np.cumsum(self.cell_seconds)])

    @cached_property
    def devices(self) -> Array:
        """An array (devices, stages): 1 if the device holds the stage."""
        num_devices = 1 + max(d for devices in self.placement for d in devices)
        holds = np.zeros((num_devices, self.num_stages))
        for stage, devices in enumerate(self.placement):
            holds[list(devices), stage] = 1
        return holds

    @cached_property
    def one_per_device(self) -> bool:
        """Whether no device holds more than one stage."""
        return bool((self.devices.sum(axis=1) <= 1).all())

    def device_seconds(self, cuts: Sequence[int]) -> Array:
        """Return every device's load, in seconds per microbatch; `cuts` as in `cuts_of`."""
        return self._per_device(self.starts, self.ends, cuts)

    def device_bytes(self, cuts: Sequence[int]) -> Array:
        """Return every device's memory need; zeros if there is no cap."""
        if not self.capped:
            return np.zeros(len(self.devices))
        return self._per_device(self.start_bytes, self.end_bytes, cuts)

    def busiest_seconds(self, cuts: Sequence[int]) -> float:
        """Return the objective, the largest load; infinite if a device's memory is too small."""
        if (self.device_bytes(cuts) > self.memory_bytes).any():
            return float("inf")
        return float(self.device_seconds(cuts).max())

    @cached_property
    def least_seconds(self) -> float:
        """A lower bound for all cuts: the mean load, or the heaviest cells that share a device.

        Of the j * K + 1 heaviest cells, one of the K devices has at least j + 1.
        """
        num_devices = len(self.devices)
        moves = np.array([here != there for here, there in pairwise(self.placement)], dtype=bool)
        shares = np.array([len(devices) for devices in self.placement])
        least = float(self.transfers[1:-1].min()) if moves.any() else 0.0
        # A boundary costs each of its sides a transfer, divided among replicas like other work.
        sides = np.r_[moves, False].astype(float) + np.r_[False, moves]
        heaviest = np.sort(self.cell_seconds)[::-1]
        if self.speeds:
            return max(float(self.cell_seconds.sum()) / sum(self.speeds), float(heaviest[0]))
        even = (float(self.cell_seconds.sum()) + least * float(sides.sum())) / num_devices
        if shares.max() > 1:
            return max(even, float(heaviest[0]) / int(shares.max()))
        least_sides = float((self.devices @ sides).min())
        prefix = np.concatenate([[0.0], np.cumsum(heaviest)])
        last = np.arange(1, self.num_cells + 1, num_devices)  # j * K + 1
        together = prefix[last] - prefix[last - np.arange(1, len(last) + 1)]
        return max(even, float(together.max()) + least * least_sides)

    def _per_device(self, starts: Array, ends: Array, cuts: Sequence[int]) -> Array:
        at, stages = np.asarray(cuts), np.arange(self.num_stages)
        result: Array = self.devices @ (ends[stages, at[1:]] - starts[stages, at[:-1]])
        return result


def layout(
    placement: Sequence[Sequence[int]],
    cell_seconds: Sequence[float],
    *,
    transfer_seconds: Sequence[float] | None = None,
    memory: MemoryNeeds | None = None,
    speeds: Sequence[float] = (),
) -> Layout:
    """Check the costs and arrange them for `placement`; raise PlanError if they are invalid."""
    placed = tuple(map(tuple, placement))
    check_counts(len(cell_seconds), len(placed))
    if any(not devices or len(set(devices)) != len(devices) for devices in placed):
        raise PlanError(f"placement {placed} must name the devices of every stage, each only once")
    seconds, transfers = _checked(cell_seconds, transfer_seconds)
    prefix = np.concatenate([[0.0], np.cumsum(seconds)])
    shares = np.array([len(devices) for devices in placed], dtype=np.float64)[:, None]
    moves = [here != there for here, there in pairwise(placed)]
    left, right = (np.array(side, dtype=np.float64) for side in ([0, *moves], [*moves, 0]))
    work = prefix[None, :] / _slowest(placed, speeds)
    starts = (work - left[:, None] * transfers) / shares
    ends = (work + right[:, None] * transfers) / shares
    common = Layout(
        placement=placed,
        cell_seconds=seconds,
        transfers=transfers,
        starts=starts,
        ends=ends,
        speeds=tuple(speeds),
    )
    if memory is None:
        return common
    sums = (np.cumsum(np.asarray(each, dtype=np.float64)) for each in (memory.state, memory.kept))
    state, kept = (np.concatenate([[0.0], each]) for each in sums)
    inputs, graphs = (
        np.asarray(n, dtype=np.float64)[:, None] for n in (memory.inputs, memory.graphs)
    )
    whole = state[None, :] + graphs * kept
    most, shares_of_cap = _caps(placed, memory.memory_bytes)
    crossing = list(pairwise(placed))  # of several boundaries between two devices each has a part
    parts = [moved / crossing.count(pair) for moved, pair in zip(moves, crossing, strict=True)]
    before, after = np.array([[0, *parts], [*parts, 0]], dtype=np.float64)[:, :, None]
    return replace(
        common,
        memory_bytes=most,
        start_bytes=shares_of_cap
        * (whole - inputs * np.asarray(memory.entering) - before * np.asarray(memory.arriving)),
        end_bytes=shares_of_cap
        * (whole + graphs * np.asarray(memory.closing) + after * np.asarray(memory.returning)),
    )


def _slowest(placement: Placement, speeds: Sequence[float]) -> Array:
    """Return the speed of every stage's slowest device."""
    return np.array([[min(speeds[d] for d in devices) if speeds else 1.0] for devices in placement])


def _caps(placement: Placement, caps: float | Sequence[float]) -> tuple[float, Array]:
    """Return the largest cap and, per stage, by what its bytes count for more under its own.

    A device's need is a sum over its stages, so a smaller cap is the largest one with larger needs.
    """
    if not isinstance(caps, Sequence):
        return caps, np.ones((len(placement), 1))
    own = np.array([[min(caps[device] for device in devices)] for devices in placement])
    most = float(max(caps))
    exactly = 1 - 1e-12  # a need that is the cap stays within it
    return most, most / np.maximum(own, 1.0) * exactly if np.isfinite(most) else np.ones_like(own)


def _checked(
    cell_seconds: Sequence[float], transfer_seconds: Sequence[float] | None
) -> tuple[Array, Array]:
    """Return cell seconds, and transfer seconds with 0 at both ends; raise PlanError if invalid."""
    num_cells = len(cell_seconds)
    seconds, transfers = np.asarray(cell_seconds, dtype=np.float64), np.zeros(num_cells + 1)
    if transfer_seconds is not None:
        if len(transfer_seconds) != num_cells - 1:
            raise PlanError(
                f"got {len(transfer_seconds)} transfer times for {num_cells} cells; "
                f"give one for each of the {num_cells - 1} inner boundaries"
            )
        transfers[1:-1] = transfer_seconds
    for what in (seconds, transfers):
        if not np.isfinite(what).all():
            raise PlanError("costs must be finite numbers; measure again or give a balance")
        if (what < 0).any():
            raise PlanError("costs must not be negative; measure again or give a balance")
    return seconds, transfers


def cuts_of(balance: Sequence[int]) -> tuple[int, ...]:
    """Return where the stages begin, and the end of the last: (2, 3) -> (0, 2, 5)."""
    return tuple(int(at) for at in np.concatenate([[0], np.cumsum(balance)]))


def balance_of(cuts: Sequence[int]) -> tuple[int, ...]:
    """Return the inverse of `cuts_of`."""
    return tuple(int(b - a) for a, b in pairwise(cuts))
