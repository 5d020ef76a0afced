"""Where a plan places cells and stages; builds this rank's stages."""

import bisect
import contextlib
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from stagewise.engine.stage.loss import Loss
from stagewise.engine.stage.skips import SkipRoutes
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.ranks import Ranks
from stagewise.mesh import Mesh
from stagewise.model.cell import Cell
from stagewise.planning.plan import Plan


def devices_of_cells(plan: Plan) -> list[tuple[int, ...]]:
    """Return the devices that run each cell of the chain: several if its stage is replicated."""
    placement = plan.built_schedule.placement
    return [placement[stage] for stage in _stages(plan)]


def mesh_of(plan: Plan, ranks: Ranks) -> Mesh:
    """Return the mapping of `plan` to ranks."""
    return Mesh(plan.built_schedule.placement, ranks.num_ranks)


def ranks_of_stages(plan: Plan, ranks: Ranks) -> list[tuple[int, ...]]:
    """Return the ranks that run each stage."""
    return [*map(mesh_of(plan, ranks).ranks_of, range(plan.built_schedule.num_stages))]


def ranks_of_cells(plan: Plan, ranks: Ranks) -> list[tuple[int, ...]]:
    """Return the ranks that run each cell of the chain: several if its stage is replicated."""
    of_stage = ranks_of_stages(plan, ranks)
    return [of_stage[stage] for stage in _stages(plan)]


def build_stages(
    cells: Iterable[Cell],
    plan: Plan,
    ranks: Ranks,
    devices: Sequence[torch.device],
    routes: SkipRoutes,
    loss: Loss | None,
) -> dict[int, Stage]:
    """Build this rank's stages, and move their cells to its devices.

    `cells` include all cells of this rank.
    """
    known, stages = {cell.index: cell for cell in cells}, {}
    for index, indices, device in own_stages(plan, ranks, devices):
        own = tuple(map(known.__getitem__, indices))
        for cell in own:
            tensors = (*cell.module.parameters(), *cell.module.buffers())
            if any(tensor.device != device for tensor in tensors):  # else even `to` may fail
                cell.module.to(device)
        is_last = index == len(plan.engine_balance) - 1
        stages[index] = routes.stage(index, own, device, is_last=is_last, loss=loss)
    return stages


def own_stages(
    plan: Plan, ranks: Ranks, devices: Sequence[torch.device]
) -> Iterator[tuple[int, range, torch.device]]:
    """Yield this rank's stages, with their cells' indices and their devices."""
    mesh, ends = mesh_of(plan, ranks), [0, *itertools.accumulate(plan.engine_balance)]
    for index, replica, _ in mesh.places_of(ranks.rank):
        device = devices[mesh.placement[index][replica]]
        yield index, range(ends[index], ends[index + 1]), device


def not_run_here(
    cells: Iterable[Cell], stages: Mapping[int, Stage], loss: Loss | None
) -> dict[str, weakref.ref[Any]]:
    """The code that other ranks run, by its name, none of which is kept alive."""
    own = {cell.index for stage in stages.values() for cell in stage.cells}
    others = {f"cell {cell.name!r}": cell.module for cell in cells if cell.index not in own}
    found: dict[str, weakref.ref[Any]] = {name: weakref.ref(m) for name, m in others.items()}
    if loss is not None and not any(stage.is_last for stage in stages.values()):
        with contextlib.suppress(TypeError):
            found["the loss function"] = weakref.ref(loss)
    return found


def first_devices(plan: Plan) -> list[int]:
    """Return every stage's first device."""
    return [devices[0] for devices in plan.built_schedule.placement]


def _stages(plan: Plan) -> list[int]:
    """Return the stage of every cell."""
    ends = list(itertools.accumulate(plan.engine_balance))
    return [bisect.bisect_right(ends, cell) for cell in range(ends[-1])]
