"""The plan of a recipe on a mesh: of one shape, or of the fastest that fits."""

import functools
from contextlib import suppress
from dataclasses import replace

from stagewise.engine.transport.pretended import Beside
from stagewise.errors import PlanError, ScheduleError
from stagewise.mesh import MeshShape, is_data_axis
from stagewise.model.cells_of import chain_for
from stagewise.planning.choice import requested_schedule
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.meshes.divided_cells import DividedCells
from stagewise.planning.meshes.mesh_cost import MeshCost
from stagewise.planning.meshes.mesh_search import MeshChoice, search_meshes
from stagewise.planning.partition.balance import check_counts
from stagewise.planning.plan import Plan, plan_for
from stagewise.planning.request import AUTO, PlanRequest
from stagewise.slow_notice import told
from stagewise.training.batches import TrainingBatches
from stagewise.training.mesh.data_parts import DataParts
from stagewise.training.pricing.divided import axes_of, divided_cells
from stagewise.training.recipe import Batch, Recipe
from stagewise.training.recipe_costs import meta_model, num_samples_of, room_of

_WHERE_NEEDED = {"never": ("never", AUTO)}  # what a search over meshes tries until one fits


def priced_mesh(
    recipe: Recipe, request: PlanRequest, device: DeviceSpec, shape: MeshShape | None
) -> MeshChoice:
    """Return the fastest mesh of the request's devices, or what `shape` would cost.

    Costs are estimated for `device`. Each data rank plans for its own part of the batch: with the
    request's number of microbatches, or as many of 1, 2, 4 and 8 for each device as are fastest.
    If no mesh fits, those are searched that recompute.
    """
    prices = _Prices(recipe, request, device)
    with told(f"estimating the model's cells for {device.name}"):
        axes, without = axes_of(recipe)
        if shape is not None:
            for name, why in without:
                if name in shape.long_axes and recipe.mesh.parallelize is not None:
                    raise PlanError(f"the mesh {shape} has an axis {name}, but {why}")
            return MeshChoice(chosen=prices.of(shape, request.recompute), others=(), rejected=())
        assert request.num_devices is not None
        *tried, last = _WHERE_NEEDED.get(request.recompute, (request.recompute,))
        for recompute in tried:
            price = functools.partial(prices.of, recompute=recompute)
            with suppress(PlanError):
                return search_meshes(request.num_devices, price, axes).without(without)
        price = functools.partial(prices.of, recompute=last)
        return search_meshes(request.num_devices, price, axes).without(without)


class _Prices:
    """What meshes of a recipe cost; cells of one kind and size are estimated once."""

    def __init__(self, recipe: Recipe, request: PlanRequest, device: DeviceSpec) -> None:
        self._recipe, self._request, self._device = recipe, request, device
        self._batch = TrainingBatches(recipe, seed=0).first
        chain = chain_for(meta_model(recipe), self._batch[0], {}, recipe.cells)
        self._num_cells = len(chain)
        self._room = room_of(recipe, chain, device, 1)
        if request.memory_bytes is not None:
            self._room = replace(self._room, memory_bytes=int(min(request.caps(1) or ())))
        self._cells: dict[tuple[object, ...], DividedCells] = {}
        self._plans = functools.cache(self._planned)

    def of(self, shape: MeshShape, recompute: str) -> MeshCost:
        """Return what a mesh costs; a StagewiseError says why it is impossible."""
        self._recipe.mesh.check(shape)
        divided = tuple(
            Beside(name, length, shape.span_of(name))
            for name, length in shape.beside.items()
            if length > 1 and not is_data_axis(name)
        )
        axes = DataParts.of(self._recipe.mesh, shape, 0).axes
        found = self._plans(
            shape.num_devices, tuple(axes.items()), divided, shape.num_ranks, recompute
        )
        costs = [
            MeshCost(
                shape=shape, plan=plan, room=self._room, link_over=self._device.link, cells=cells
            ).within_memory()
            for plan, cells in found
        ]
        if not costs:
            raise PlanError("no schedule takes such numbers of devices and microbatches")
        return min(costs, key=lambda cost: (not cost.fits, cost.step_seconds))

    def _planned(
        self,
        pipeline: int,
        data: tuple[tuple[str, int], ...],
        divided: tuple[Beside, ...],
        links: int,
        recompute: str,
    ) -> list[tuple[Plan, DividedCells]]:
        check_counts(self._num_cells, pipeline)
        axes, dims = dict(data), self._recipe.mesh.data_axes
        parts = DataParts(axes, dict.fromkeys(axes, 0), {n: d for n in axes if (d := dims.get(n))})
        part, found = parts.own(self._batch), list[tuple[Plan, DividedCells]]()
        own = replace(self._request, num_devices=pipeline, memory_bytes=None, recompute=recompute)
        for count in own.counts(num_samples_of(part)):
            cells = self._cells_of(part, count, divided)
            for fixed in own.fixed_with(count):
                with suppress(ScheduleError, PlanError):  # not every schedule takes every number
                    check_counts(self._num_cells, requested_schedule(fixed).num_stages)
                    link = self._device.link(links)
                    found.append((plan_for(fixed, cells.costs, link=link), cells))
        return found

    def _cells_of(self, part: Batch, count: int, divided: tuple[Beside, ...]) -> DividedCells:
        key = -(-num_samples_of(part) // count), divided
        if key not in self._cells:
            self._cells[key] = divided_cells(self._recipe, part, count, self._device, divided)
        return self._cells[key]
