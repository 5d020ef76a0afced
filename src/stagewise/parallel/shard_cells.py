"""`fully_shard` for each cell of a stage, so that nobody must write it.

Each cell is a group of its own, gathered and reduced at once. What several cells use (tied weights)
and what hangs at no cell is the stage's own group, since a group must hold a parameter alone.
"""

from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from stagewise.errors import PlanError
from stagewise.mesh import shards_parameters


def shard_cells(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    """Shard a stage's parameters over the axis of `mesh` that is called dp_shard, fsdp or the like.

    A Pipeline's `parallelize`. Gradients are summed over the other data axes as well (HSDP).
    """
    axis = _sharding_axis(mesh)
    cells = [*_cells(stage)]
    users = Counter(parameter for cell in cells for parameter in cell.parameters())
    for cell in cells:
        own = [*cell.parameters()]
        if own and all(users[parameter] == 1 for parameter in own):
            fully_shard(cell, mesh=mesh[axis])
    if any(True for _ in stage.parameters()):
        fully_shard(stage, mesh=mesh[axis])


def _sharding_axis(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names or ()
    found = [name for name in names if shards_parameters(name)]
    if len(found) != 1:
        raise PlanError(
            f"shard_cells needs one axis to shard over, called dp_shard or fsdp, but the mesh has "
            f"{found or 'none'} among {list(names)}; rename the axes, or call fully_shard yourself"
        )
    return found[0]


def _cells(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules below `module` that are more than containers."""
    for child in module.children():
        if type(child) in (nn.Module, nn.ModuleList, nn.ModuleDict):
            yield from _cells(child)
        else:
            yield child
