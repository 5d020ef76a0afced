"""What a recipe does with the axes of a mesh, checked before anything starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stagewise.engine.transport.device_mesh import mesh_here
from stagewise.errors import PlanError, RecipeError
from stagewise.mesh import MeshShape, is_data_axis, shards_parameters

Parallelize = Callable[[nn.Module, Any, int], object]


@dataclass(frozen=True)
class RecipeMesh:
    """A recipe's own `parallelize`, if any, and the dimension that each of its axes divides."""

    path: Path
    parallelize: Parallelize | None
    data_axes: Mapping[str, int]
    in_float32: bool

    def data_axes_of(self, shape: MeshShape) -> tuple[str, ...]:
        """Return the axes of a mesh along which ranks have parts of the batch."""
        return tuple(n for n in shape.beside if is_data_axis(n) or n in self.data_axes)

    def check(self, shape: MeshShape) -> None:
        """Raise a UsageError unless the recipe has a use for every axis of the mesh."""
        data_axes = self.data_axes_of(shape)
        for name in shape.beside:
            if is_data_axis(name) is None and name not in data_axes:
                raise PlanError(
                    f"the mesh {shape} has an axis {name!r}, along which batches may be divided "
                    f"or not; call it dp..., tp, sp or ep, or name it in {self.path}: data_axes = "
                    f"{{{name!r}: 0}} divides samples, 1 the sequences"
                )
        if self.parallelize is not None:
            return
        for name, length in shape.beside.items():
            if length > 1 and name not in data_axes:
                raise RecipeError(
                    f"the mesh {shape} has an axis {name!r}, but nothing in {self.path} uses it; "
                    "define parallelize(module, mesh, stage_index) there, for example:\n\n"
                    f"def parallelize(module, mesh, stage_index):\n"
                    f"    parallelize_module(module, mesh[{name!r}], {{...}})"
                )
        sharding = [name for name in data_axes if shards_parameters(name)]
        if len(sharding) > 1:
            raise PlanError(
                f"the mesh {shape} has several axes to shard parameters over, "
                f"{', '.join(sharding)}; leave all but one out, or define parallelize(module, "
                f"mesh, stage_index) in {self.path}"
            )
        if sharding and self.in_float32:
            raise RecipeError(
                f"{self.path} has accumulate_in_float32 = True, but parameters that are sharded "
                f"over {sharding[0]} have their gradients summed by fully_shard; leave it out, or "
                "define parallelize(module, mesh, stage_index) with a MixedPrecisionPolicy"
            )

    def options(self, shape: MeshShape | None) -> dict[str, Any]:
        """Return what the recipe's Pipeline is given for the mesh; every rank calls this."""
        if shape is None:
            return {}
        data_axes, parallelize = self.data_axes_of(shape), self.parallelize
        if parallelize is None and any(map(shards_parameters, data_axes)):
            from stagewise.parallel import shard_cells as parallelize  # takes a second to import
        return {"mesh": mesh_here(shape), "parallelize": parallelize, "data_axes": data_axes}

    def in_words(self, shape: MeshShape | None) -> list[str]:
        """Return what a run says of its mesh, or of a `parallelize` that it does not call."""
        if shape is None:
            if self.parallelize is None:
                return []
            why = "is not called: this run has no mesh (--mesh, --pipeline, --shard, --tensor)"
            return [f"note: parallelize in {self.path} {why}"]
        uses, data_axes = [], self.data_axes_of(shape)
        for name, length in shape.beside.items():
            dim = self.data_axes.get(name, 0)
            what = f"dimension {dim} of every batch" if dim else "the samples of every batch"
            shared = "each rank has the same part of the batch"
            uses.append(f"{name} ({length}): {f'divides {what}' if name in data_axes else shared}")
            if self.parallelize is None and shards_parameters(name):
                uses[-1] += ", and shards parameters, gradients and optimizer state"
        if any(self.data_axes.get(name) for name in data_axes):
            uses.append("metrics and generate are left out: they take whole sequences")
        return [f"mesh {shape}, {shape.num_ranks} processes", *(f"  {use}" for use in uses)]
