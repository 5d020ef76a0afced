"""Who runs what: a *rank* is a process, a plan counts *devices*, a *place* is what a device holds.

A plan's placement says which devices hold which stage; the replicas of a stage take its
microbatches in turn. Either one process runs all devices, or rank r of the pipeline's process
group runs device r. Only this module maps devices to ranks.

On a device mesh with other axes, pipelines run side by side: ranks that differ along those axes
only run the same stages. `Slices` says which ranks are one pipeline, and which give the same part
of the batch; messages and the engine number ranks within their own pipeline.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

from stagewise.errors import BatchError, UsageError, is_number

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


class Seating(NamedTuple):
    """Where a rank of a device mesh sits."""

    stage: int  # its rank in its pipeline
    data: tuple[int, ...] = ()  # along the axes whose ranks have parts of the batch of their own
    other: tuple[int, ...] = ()  # along the others, whose ranks have the same part


@dataclass(frozen=True)
class Slices:
    """The pipelines that run side by side on a mesh, with `seatings` by rank, as `rank` sees them.

    >>> slices = Slices(2, tuple(Seating(s, (d,)) for d in range(2) for s in range(2)), ("dp",))
    >>> slices.own, slices.beside(("dp",), [0]), slices.cohorts
    ((2, 3), [0, 2], ((0, 1), (2, 3)))
    """

    rank: int
    seatings: tuple[Seating, ...]
    data_axes: tuple[str, ...] = ()
    # Data axes along which cells exchange parts of a microbatch; True: parts of one shape.
    exchanged: Mapping[str, bool] = field(default_factory=dict)

    @staticmethod
    def one(rank: int, num_ranks: int) -> "Slices":
        """Return those of a single pipeline."""
        return Slices(rank, tuple(map(Seating, range(num_ranks))))

    @property
    def seat(self) -> Seating:
        return self.seatings[self.rank]

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The ranks of this rank's pipeline, in order."""
        return self.of_data(self.data_index)

    @cached_property
    def parts(self) -> list[tuple[int, ...]]:
        """The places along the data axes, in order: each has a part of the batch."""
        return sorted({seating.data for seating in self.seatings})

    @cached_property
    def data_index(self) -> int:
        """Which part of the batch this rank has."""
        return self.parts.index(self.seat.data)

    def of_data(self, index: int) -> tuple[int, ...]:
        """Return the ranks of the pipeline that has part `index`, beside this rank's."""
        data, other = self.parts[index], self.seat.other
        found = [(s.stage, r) for r, s in enumerate(self.seatings) if s[1:] == (data, other)]
        return tuple(rank for _, rank in sorted(found))

    @cached_property
    def pipelines(self) -> list[tuple[int, ...]]:
        """The pipelines that have the parts of the batch, in order, beside this rank's."""
        return [self.of_data(index) for index in range(len(self.parts))]

    @cached_property
    def cohorts(self) -> tuple[tuple[int, ...], ...]:
        """For each part of the batch, the ranks that have it."""
        ranks: dict[tuple[int, ...], list[int]] = {data: [] for data in self.parts}
        for rank, seating in enumerate(self.seatings):
            ranks[seating.data].append(rank)
        return tuple(map(tuple, ranks.values()))

    def check_counts(self, num_microbatches: Sequence[int]) -> None:
        """Raise BatchError unless parts of which cells exchange microbatches have equally many."""
        for group in self._along(self.exchanged) if self.exchanged else ():
            if len(counts := {num_microbatches[index] for index in group}) > 1:
                raise BatchError(
                    f"cells exchange parts of every microbatch along {', '.join(self.exchanged)}, "
                    f"but ranks there have batches for {sorted(counts)} microbatches; give each "
                    f"rank at least {max(counts)} samples"
                )

    @cached_property
    def alike(self) -> list[list[int]]:
        """The ranks of each group whose parts of the batch must have equal shapes."""
        axes = [name for name, is_alike in self.exchanged.items() if is_alike]
        groups = self._along(axes) if axes else []
        return [[rank for part in group for rank in self.cohorts[part]] for group in groups]

    def _along(self, axes: Collection[str]) -> list[list[int]]:
        """Return the parts of the batch, by index, in groups that differ along these axes only."""
        fixed = [i for i, name in enumerate(self.data_axes) if name not in axes]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, data in enumerate(self.parts):
            groups.setdefault(tuple(data[i] for i in fixed), []).append(index)
        return [*groups.values()]

    def beside(self, axes: Collection[str] | None, stages: Sequence[int]) -> list[int]:
        """Return the ranks at `stages` of the pipelines that differ from ours along `axes` only.

        Those of all pipelines if that is None.
        """
        if axes is None:
            return [rank for rank, seating in enumerate(self.seatings) if seating.stage in stages]
        fixed = [i for i, name in enumerate(self.data_axes) if name not in axes]
        return [
            rank
            for rank, (stage, data, other) in enumerate(self.seatings)
            if stage in stages
            and other == self.seat.other
            and all(data[i] == self.seat.data[i] for i in fixed)
        ]


PIPELINE_AXIS = "pp"
# What the names of data axes begin with, and what those of axes begin with that share a batch.
_DATA = ("dp", "ddp", "data", "fsdp", "hsdp", "replicate", "shard")
_SHARED = ("tp", "tensor", "cp", "context", "sp", "sequence", "ep", "expert", "model")


def is_data_axis(name: str) -> bool | None:
    """Return whether ranks along an axis have a part of the batch each; None: its name is unclear.

    >>> is_data_axis("dp_shard"), is_data_axis("tp"), is_data_axis("x")
    (True, False, None)
    """
    if name.startswith(_DATA):
        return True
    return False if name.startswith(_SHARED) else None


def shards_parameters(name: str) -> bool:
    """Return whether an axis is a data axis over which parameters are sharded too."""
    return is_data_axis(name) is True and ("shard" in name or "fsdp" in name)


@dataclass(frozen=True)
class MeshShape:
    """The axes of a mesh by name, with their lengths, the pipeline's among them.

    >>> shape = MeshShape.of("dp_shard=2,tp=2")
    >>> str(shape), shape.num_ranks, shape.num_devices, shape.beside
    ('pp=1,dp_shard=2,tp=2', 4, 1, {'dp_shard': 2, 'tp': 2})
    """

    axes: tuple[tuple[str, int], ...]

    @staticmethod
    def of(text: str) -> "MeshShape":
        """Return the shape that is written so; UsageError if it is none."""
        axes: dict[str, int] = {}
        for word in text.split(","):
            name, _, length = (part.strip() for part in word.partition("="))
            if not name.isidentifier() or not is_number(length) or not 0 < int(length) < 1 << 31:
                raise UsageError(
                    f"--mesh {text!r} has {word!r}, which is no axis with its length; write axes "
                    "such as --mesh pp=2,dp_shard=2"
                )
            if name in axes:
                raise UsageError(f"--mesh {text!r} has the axis {name} twice; name every axis once")
            axes[name] = int(length)
        return MeshShape.with_pipeline(axes)

    @staticmethod
    def with_pipeline(axes: Mapping[str, int], num_devices: int = 1) -> "MeshShape":
        """Return the shape of `axes`, and of a pipeline of `num_devices` unless it is there."""
        before = {} if PIPELINE_AXIS in axes else {PIPELINE_AXIS: num_devices}
        return MeshShape((*before.items(), *axes.items()))

    @property
    def num_ranks(self) -> int:
        return prod(length for _, length in self.axes)

    @property
    def num_devices(self) -> int:
        """Those of the plan: the pipeline's length."""
        return dict(self.axes)[PIPELINE_AXIS]

    @property
    def beside(self) -> dict[str, int]:
        """The axes beside the pipeline's."""
        return {name: length for name, length in self.axes if name != PIPELINE_AXIS}

    def span_of(self, axis: str) -> int:
        """Return how many ranks in a row those along an axis span."""
        names = [name for name, _ in self.axes]
        return prod(length for _, length in self.axes[names.index(axis) :])

    @property
    def long_axes(self) -> frozenset[str]:
        """The axes of more than one rank."""
        return frozenset(name for name, length in self.axes if length > 1)

    def __str__(self) -> str:
        return ",".join(f"{name}={length}" for name, length in self.axes)
