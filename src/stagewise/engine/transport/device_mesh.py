"""A torch DeviceMesh: which ranks are one pipeline, and which have the same part of a batch.

The pipeline's axis is named; along the *data axes* every rank gives its own part of the batch,
along all others (such as tensor parallelism's) the same. Names decide unless the caller does.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh as DeviceMesh
from torch.distributed.device_mesh import init_device_mesh

from stagewise.engine.transport.processes import own_device, timeout_of
from stagewise.engine.transport.wires.new_group import new_group
from stagewise.errors import PlanError
from stagewise.mesh import PIPELINE_AXIS, MeshShape, Seating, Slices, is_data_axis


def mesh_here(shape: MeshShape) -> DeviceMesh:
    """Return the mesh of all processes; collective."""
    names, lengths = zip(*shape.axes, strict=True)
    return init_device_mesh(own_device().type, lengths, mesh_dim_names=names)


_exchanged: ContextVar[dict[str, bool] | None] = ContextVar("stagewise_exchanged", default=None)


@contextmanager
def exchanges_noted() -> Iterator[dict[str, bool]]:
    """Inside, collect along which axes cells are made to exchange parts of a batch.

    True: of equally shaped parts.
    """
    noted: dict[str, bool] = {}
    token = _exchanged.set(noted)
    try:
        yield noted
    finally:
        _exchanged.reset(token)


def note_exchange(axis: DeviceMesh, *, is_alike: bool) -> None:
    """Say that cells will exchange parts of a batch along `axis`, of equal shapes if `is_alike`."""
    if (noted := _exchanged.get()) is not None:
        for name in axis.mesh_dim_names or ():
            noted[name] = noted.get(name, False) or is_alike


@dataclass(frozen=True)
class HereOnMesh:
    """This rank on a mesh."""

    slices: Slices
    pipeline: dist.ProcessGroup  # of this rank's pipeline
    everyone: dist.ProcessGroup  # of all ranks of the mesh


@dataclass(frozen=True)
class OnMesh:
    """A mesh as the caller gave it; None for data axes: those that are called so."""

    mesh: DeviceMesh
    pipeline_axis: str = PIPELINE_AXIS
    data_axes: Sequence[str] | None = None

    def checked(self, transport: str, num_devices: int) -> HereOnMesh:
        """Return this rank's place; PlanError if the mesh does not fit."""
        names = self._names()
        if transport == "local":
            raise PlanError(
                "transport is 'local' and a mesh was given, but a mesh's ranks are processes; "
                "leave transport out"
            )
        data_axes = self._data_axes(names)
        size = self.mesh.size(names.index(self.pipeline_axis))
        if size != num_devices:
            raise PlanError(
                f"the plan needs {num_devices} ranks, one per device, but the mesh has {size} "
                f"along {self.pipeline_axis!r}; make the mesh {num_devices} long there, or plan "
                f"for {size} devices"
            )
        if self.mesh.get_coordinate() is None:
            raise PlanError(
                f"rank {dist.get_rank()} is not on the mesh, which has the ranks "
                f"{sorted(self.mesh.mesh.flatten().tolist())}; build the Pipeline on those only"
            )
        everyone = self._everyone()
        slices = self._slices(names, data_axes, everyone)
        return HereOnMesh(slices, self.mesh.get_group(self.pipeline_axis), everyone)

    def _names(self) -> tuple[str, ...]:
        if not isinstance(self.mesh, DeviceMesh):
            raise PlanError(
                f"mesh is a {type(self.mesh).__name__}; give a DeviceMesh with named axes, as "
                "torch.distributed.device_mesh.init_device_mesh(..., mesh_dim_names=...) makes it"
            )
        names = self.mesh.mesh_dim_names or ()
        if self.pipeline_axis not in names:
            raise PlanError(
                f"the mesh has the axes {names}, none of which is {self.pipeline_axis!r}; name the "
                "pipeline's axis so in mesh_dim_names, or say which it is with pipeline_axis="
            )
        return names

    def _data_axes(self, names: Sequence[str]) -> tuple[str, ...]:
        rest = [name for name in names if name != self.pipeline_axis]
        if self.data_axes is not None:
            if unknown := [name for name in self.data_axes if name not in rest]:
                raise PlanError(
                    f"data_axes names {unknown}, but besides {self.pipeline_axis!r} the mesh has "
                    f"the axes {rest}; name some of those"
                )
            return tuple(name for name in rest if name in self.data_axes)
        if unclear := [name for name in rest if is_data_axis(name) is None]:
            raise PlanError(
                f"the mesh's axes {unclear} may have ranks with a part of the batch each, or with "
                "the same; name the axes along which the batch is split in data_axes="
            )
        return tuple(name for name in rest if is_data_axis(name))

    def _everyone(self) -> dist.ProcessGroup:
        ranks, world = sorted(self.mesh.mesh.flatten().tolist()), dist.group.WORLD
        assert world is not None
        if len(ranks) == dist.get_world_size():
            return world
        made = new_group(ranks, timeout_of(world), apart=True)
        assert made is not None
        return made

    def _slices(
        self, names: Sequence[str], data_axes: Sequence[str], everyone: dist.ProcessGroup
    ) -> Slices:
        along, seats = names.index(self.pipeline_axis), {}
        data = [names.index(name) for name in data_axes]
        other = [i for i in range(len(names)) if i != along and i not in data]
        lines: dict[tuple[int, ...], list[int]] = {}  # the ranks of each pipeline
        for place in itertools.product(*map(range, self.mesh.mesh.shape)):
            line = lines.setdefault(place[:along] + place[along + 1 :], [])
            line.append(int(self.mesh.mesh[place]))
        for place in itertools.product(*map(range, self.mesh.mesh.shape)):
            rank = int(self.mesh.mesh[place])
            # Process groups number their ranks in order, wherever these stand on the mesh.
            stage = sorted(lines[place[:along] + place[along + 1 :]]).index(rank)
            seats[rank] = Seating(
                stage, tuple(place[i] for i in data), tuple(place[i] for i in other)
            )
        in_order = tuple(seats[rank] for rank in sorted(seats))
        return Slices(dist.get_rank(everyone), in_order, tuple(data_axes))
