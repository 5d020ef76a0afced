"""Which part of a recipe's batch each rank of a mesh gets.

Every rank has the same data. Along most data axes the samples are divided, in order; along those
for which a recipe names another dimension (a sequence's), every tensor that has that dimension.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.markers import is_mark
from stagewise.batch.split import extent, microbatch_sizes, split
from stagewise.batch.values import flatten
from stagewise.errors import BatchError
from stagewise.mesh import MeshShape
from stagewise.training.mesh.recipe_mesh import RecipeMesh

Batch = tuple[Any, Any]

SAMPLES = 0  # in a recipe's `data_axes`, whatever its batch_dim


@dataclass(frozen=True)
class DataParts:
    """The data axes with their lengths, this rank's place along each, and what they divide."""

    axes: Mapping[str, int] = field(default_factory=dict)
    place: Mapping[str, int] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)  # of axes that divide no samples

    @staticmethod
    def of(recipe: RecipeMesh, shape: MeshShape | None, rank: int) -> "DataParts":
        """Return those of process `rank`."""
        if shape is None:
            return DataParts()
        every = itertools.product(*(range(length) for _, length in shape.axes))
        coordinates = next(itertools.islice(every, rank, None))
        place = {name: at for (name, _), at in zip(shape.axes, coordinates, strict=True)}
        axes = {name: dict(shape.axes)[name] for name in recipe.data_axes_of(shape)}
        dims = {name: dim for name in axes if (dim := recipe.data_axes.get(name, SAMPLES))}
        return DataParts(axes, {name: place[name] for name in axes}, dims)

    def own(self, batch: Batch) -> Batch:
        """Return this rank's part."""
        return self._at(batch, self.place)

    def every(self, batch: Batch) -> list[Batch]:
        """Return all parts, in order."""
        places = itertools.product(*(range(length) for length in self.axes.values()))
        return [self._at(batch, dict(zip(self.axes, at, strict=True))) for at in places]

    def _at(self, batch: Batch, place: Mapping[str, int]) -> Batch:
        for dim in {SAMPLES, *self.dims.values()}:
            index, number = 0, 1
            for name, length in self.axes.items():
                if self.dims.get(name, SAMPLES) == dim:
                    index, number = index * length + place[name], number * length
            if number > 1:
                batch = (
                    _samples(batch, index, number)
                    if dim == SAMPLES
                    else (
                        _narrowed(batch[0], dim, index, number),
                        _narrowed(batch[1], dim, index, number),
                    )
                )
        return batch


WHOLE = DataParts()


def _samples(batch: Batch, index: int, number: int) -> Batch:
    inputs, target = batch
    size = extent([("inputs", inputs), ("target", target)])
    if size.sizes is not None:
        raise BatchError(
            f"a batch of stagewise.Microbatches cannot be divided over {number} data ranks; "
            "return it undivided, or leave the data axes out"
        )
    if size.num_samples is None or size.num_samples < number:
        raise BatchError(
            f"a batch of {size.num_samples or 0} samples cannot be divided over {number} data "
            "ranks; use larger batches, drop_last=True for the last, or shorter data axes"
        )
    sizes = microbatch_sizes(size.num_samples, number)
    return split(inputs, sizes)[index], split(target, sizes)[index]


def _narrowed(value: Any, dim: int, index: int, number: int) -> Any:
    """Return `value` with part `index` along `dim` of every tensor that has so many dimensions."""

    def part(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() <= dim:
            return leaf
        if leaf.shape[dim] % number:
            raise BatchError(
                f"a tensor of shape {tuple(leaf.shape)} cannot be divided into {number} equal "
                f"parts along dimension {dim}; pad sequences to a multiple of {number}"
            )
        return leaf.chunk(number, dim)[index]

    flatten(value)  # registers dataclasses as nodes
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_mark)
    if any(map(is_mark, leaves)):
        raise BatchError(
            "a batch with marked parts (BatchDim, batch_dim, Replicated) cannot be divided along "
            "its sequences; return plain tensors with samples along dimension 0"
        )
    return pytree.tree_unflatten(map(part, leaves), spec)
