"""DTensors at stage boundaries: what travels is each rank's part, which the receiver wraps again.

Ranks beside each other along an axis such as tensor parallelism's belong to different pipelines, so
the part of one goes to the rank of the next stage that is at the same place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.utils import _pytree as pytree

from stagewise.batch.values import flatten
from stagewise.errors import ModelError


@dataclass
class Spread:
    """A DTensor on its way: this rank's part, and of what it is a part, on which axes."""

    part: torch.Tensor
    axes: tuple[str, ...]
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def let_through(cells: Sequence[nn.Module], mesh: DeviceMesh, *, is_last: bool) -> None:
    """Let the values that the cells of a stage receive and return be DTensors.

    What the last stage returns is the caller's, and stays as it is.
    """

    def receive(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _mapped((args, kwargs), lambda leaf: _wrapped(leaf, mesh), Spread)

    def send(module: nn.Module, args: Any, output: Any) -> Any:
        return _mapped(output, _spread, DTensor)

    cells[0].register_forward_pre_hook(receive, prepend=True, with_kwargs=True)
    if not is_last:
        cells[-1].register_forward_hook(send)


def _mapped(value: Any, change: Any, kind: type) -> Any:
    flatten(value)  # registers dataclasses as nodes
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda node: isinstance(node, Spread))
    if not any(isinstance(leaf, kind) for leaf in leaves):
        return value
    return pytree.tree_unflatten([change(x) if isinstance(x, kind) else x for x in leaves], spec)


def _spread(tensor: DTensor) -> Spread:
    axes = tensor.device_mesh.mesh_dim_names
    if not axes:
        raise ModelError(
            f"a stage returned a DTensor on a mesh without names ({tensor.device_mesh}), so the "
            "next stage cannot know its axes; name them with mesh_dim_names"
        )
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return Spread(tensor.to_local(), tuple(axes), tuple(tensor.placements), shape, stride)


def _wrapped(value: Spread, mesh: DeviceMesh) -> DTensor:
    made: DTensor = DTensor.from_local(
        value.part,
        mesh[value.axes],
        value.placements,
        run_check=False,
        shape=torch.Size(value.shape),
        stride=value.stride,
    )
    return made
