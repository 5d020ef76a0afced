"""Who runs what: a *rank* is a process, a plan counts *devices*, a *place* is what one holds.

A plan's placement says which devices hold which stage; its replicas share the microbatches in
turn. Either one process runs all devices, or each rank of the pipeline's process group runs the
device of its number. Nothing else says which rank that is.

A mesh with other axes (torch's DeviceMesh with "dp", "pp" and "tp", say) enters here: every slice
along "pp" is a pipeline with a Mesh, wires and ranks of its own (`between_processes(device,
mesh.get_group("pp"))`), whose numbers count within the slice, so that neither messages nor the
engine know of other slices. What a rank has of its stages along "tp" is the `shard` of its places,
for whoever names, seeds and saves parameters; what slices along "dp" sum is a matter of gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Placement = tuple[tuple[int, ...], ...]  # per stage: its devices


def replica_of(microbatch: int, num_replicas: int) -> int:
    """Which of a stage's replicas runs a microbatch: they take turns."""
    return microbatch % num_replicas


def dealt(devices: Sequence[int], num_microbatches: int) -> list[int]:
    """Of a stage's `devices`, the one that runs each microbatch.

    >>> dealt((4, 5), 3)
    [4, 5, 4]
    """
    return [devices[replica_of(m, len(devices))] for m in range(num_microbatches)]


class Place(NamedTuple):
    """What a device holds: a part of a copy of a stage."""

    stage: int
    replica: int = 0
    shard: int = 0  # of one, so far


@dataclass(frozen=True)
class Mesh:
    """A plan's devices on `num_ranks` ranks: one that runs them all, or one for each.

    >>> Mesh(((0,), (1, 2)), 3).places_of(2)
    (Place(stage=1, replica=1, shard=0),)
    """

    placement: Placement
    num_ranks: int

    def rank_of(self, device: int) -> int:
        """The rank that runs `device`."""
        return device if self.num_ranks > 1 else 0

    def ranks_of(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold `stage`, in order of its replicas."""
        return tuple(dict.fromkeys(map(self.rank_of, self.placement[stage])))

    def rank_for(self, stage: int, microbatch: int) -> int:
        """The rank that runs `stage` on a microbatch."""
        devices = self.placement[stage]
        return self.rank_of(devices[replica_of(microbatch, len(devices))])

    def device_of(self, stage: int, rank: int) -> int | None:
        """Where `rank` keeps `stage`, once, whoever its replicas are; None if it does not."""
        own = (device for device in self.placement[stage] if self.rank_of(device) == rank)
        return next(own, None)

    def places_of(self, rank: int) -> tuple[Place, ...]:
        """What `rank` holds, by stage."""
        return tuple(
            Place(stage, devices.index(device))
            for stage, devices in enumerate(self.placement)
            if (device := self.device_of(stage, rank)) is not None
        )
