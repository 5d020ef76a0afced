"""DTensors: parameters of which a rank holds a part.

`fully_shard` and `parallelize_module` make them. Importing them takes a second, so nothing here
does before the caller has.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from stagewise.batch.layouts import is_sharded
from stagewise.engine.stage.gradient import Gradient

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of `tensor`, or itself."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def local_gradient(parameter: nn.Parameter, gradient: Gradient) -> Gradient:
    """Return this rank's part of `gradient`, placed as `parameter` is; collective on its mesh."""
    if gradient is None or not is_sharded(gradient):
        return gradient
    there, found = cast("DTensor", parameter), cast("DTensor", gradient)
    if found.placements != there.placements:
        found = found.redistribute(placements=there.placements)
    return found.to_local()


def divided_along(parameter: torch.Tensor) -> Iterator[tuple[str, int, int]]:
    """Yield the axes along which ranks have other parts, the dimension, and the number of ranks."""
    if is_sharded(parameter):
        whole = cast("DTensor", parameter)
        names = whole.device_mesh.mesh_dim_names or ()
        for name, length, placement in zip(
            names, whole.device_mesh.shape, whole.placements, strict=False
        ):
            if not placement.is_replicate() and not placement.is_partial():
                yield name, cast("Shard", placement).dim, length


def like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return what is placed as `parameter` is, and of which this rank has `part`."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    whole = cast(DTensor, parameter)
    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def gathered_whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`, on every rank that has a part of it; collective on its mesh."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def part_of_whole(held: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return `whole` sharded as `held` is, of which this rank keeps its part; nothing is sent."""
    if not is_sharded(held) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    form = cast(DTensor, held)
    there = whole.to(device=form.to_local().device, dtype=held.dtype)
    return distribute_tensor(there, form.device_mesh, form.placements, src_data_rank=None)


def whole_norms(gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Return the norms of sharded gradients, in order, on the CPU; collective on their meshes.

    All that are sharded alike are summed at once.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    found = torch.zeros(len(gradients), dtype=torch.float64, device="cpu")
    alike: dict[tuple[DeviceMesh, tuple[bool, ...]], list[int]] = {}
    for place, gradient in enumerate(gradients):
        held = cast(DTensor, gradient)
        spread = tuple(not placement.is_replicate() for placement in held.placements)
        alike.setdefault((held.device_mesh, spread), []).append(place)
    is_power = 0 < abs(norm_type) < math.inf
    how = {math.inf: "max", -math.inf: "min"}.get(norm_type, "sum")
    for (mesh, spread), places in alike.items():
        parts = torch.stack([_norm(local_of(gradients[place]), norm_type) for place in places])
        parts = parts.double() ** norm_type if is_power else parts.double()
        for axis in [axis for axis, along in enumerate(spread) if along]:
            rules = [Partial(how) if other == axis else Replicate() for other in range(mesh.ndim)]
            parts = DTensor.from_local(parts, mesh, rules, run_check=False).full_tensor()
        found[places] = (parts ** (1 / norm_type) if is_power else parts).cpu()
    return found


def _norm(part: torch.Tensor, norm_type: float) -> torch.Tensor:
    if not part.numel():  # the rank has no rows of it
        return part.new_full((), math.inf if norm_type < 0 else 0.0)
    norm: torch.Tensor = torch.linalg.vector_norm(part, norm_type)
    return norm


Axes = tuple[str, ...]  # of the mesh, along which the batch is split


@dataclass(frozen=True)
class Sharding:
    """The sharded parameters of this rank, with the data axes that their sums lack.

    `late` are those that `fully_shard` reduces when the step ends.
    """

    axes: Mapping[nn.Parameter, Axes] = field(default_factory=dict)
    late: Collection[nn.Parameter] = ()


NO_SHARDING = Sharding()


def form_of(parameter: nn.Parameter) -> str:
    """Describe how a parameter is spread; the same on all ranks that have parts of it."""
    form = f"{tuple(parameter.shape)} {parameter.dtype}"
    if not is_sharded(parameter):
        return form
    held = cast("DTensor", parameter)
    mesh = held.device_mesh
    return f"{form} {held.placements} on {mesh.mesh_dim_names} {tuple(mesh.shape)}"


def spread_over(parameter: nn.Parameter) -> frozenset[int]:
    """Return the ranks among which a sharded parameter is spread."""
    ranks: list[int] = cast("DTensor", parameter).device_mesh.mesh.flatten().tolist()
    return frozenset(ranks)
