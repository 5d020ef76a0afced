"""Who runs what: a *rank* is a process, a plan counts *devices*, a *place* is what a device holds.

A plan's placement says which devices hold which stage; the replicas of a stage take its
microbatches in turn. Either one process runs all devices, or rank r of the pipeline's process
group runs device r. Only this module maps devices to ranks.

A mesh with other axes (such as torch's DeviceMesh with "dp", "pp" and "tp") would enter here: every
slice along "pp" is a pipeline with its own Mesh, wires and ranks (`between_processes(device,
mesh.get_group("pp"))`), numbered within the slice, so neither messages nor the engine know of other
slices. A rank's part of a stage along "tp" is the `shard` of its place, used to name, seed and save
parameters; sums over slices along "dp" belong to gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Placement = tuple[tuple[int, ...], ...]  # per stage: its devices


def replica_of(microbatch: int, num_replicas: int) -> int:
    """Return which of a stage's replicas runs a microbatch: they take turns."""
    return microbatch % num_replicas


def device_turns(devices: Sequence[int], num_microbatches: int) -> list[int]:
    """Return which of a stage's `devices` runs each microbatch.

    >>> device_turns((4, 5), 3)
    [4, 5, 4]
    """
    return [devices[replica_of(m, len(devices))] for m in range(num_microbatches)]


class Place(NamedTuple):
    """What a device holds: a shard of a replica of a stage."""

    stage: int
    replica: int = 0
    shard: int = 0  # stages are not sharded yet


@dataclass(frozen=True)
class Mesh:
    """A plan's devices on `num_ranks` ranks: one rank for all devices, or one for each.

    >>> Mesh(((0,), (1, 2)), 3).places_of(2)
    (Place(stage=1, replica=1, shard=0),)
    """

    placement: Placement
    num_ranks: int

    def rank_of(self, device: int) -> int:
        """Return the rank that runs `device`."""
        return device if self.num_ranks > 1 else 0

    def ranks_of(self, stage: int) -> tuple[int, ...]:
        """Return the ranks that hold `stage`, in order of its replicas."""
        return tuple(dict.fromkeys(map(self.rank_of, self.placement[stage])))

    def rank_for(self, stage: int, microbatch: int) -> int:
        """Return the rank that runs `stage` on a microbatch."""
        devices = self.placement[stage]
        return self.rank_of(devices[replica_of(microbatch, len(devices))])

    def device_of(self, stage: int, rank: int) -> int | None:
        """Return the first device of `rank` that holds `stage`, or None."""
        own = (device for device in self.placement[stage] if self.rank_of(device) == rank)
        return next(own, None)

    def places_of(self, rank: int) -> tuple[Place, ...]:
        """Return what `rank` holds, by stage."""
        return tuple(
            Place(stage, devices.index(device))
            for stage, devices in enumerate(self.placement)
            if (device := self.device_of(stage, rank)) is not None
        )
