"""From a recipe to the fastest plan: measured here, or estimated for a device."""

from collections.abc import Sequence
from dataclasses import dataclass

import stagewise
from stagewise.costs import CellCost
from stagewise.model.chain import chain_of
from stagewise.pipeline.capturing import chain_for
from stagewise.pipeline.searching import Microbatches, candidates, search_plan
from stagewise.planning import DeviceSpec, SearchResult, search
from stagewise.planning.search import Progress
from stagewise.training.batches import TrainingBatches
from stagewise.training.estimated import batch_size, meta_model, state_factor
from stagewise.training.prepare import build_model
from stagewise.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What the search goes over; see `stagewise.planning.search`."""

    num_devices: int
    num_microbatches: Microbatches = "auto"
    schedules: Sequence[str] | None = None
    recompute: str = "auto"
    replicas: bool = False
    memory_bytes: float | None = None


def measured_search(recipe: Recipe, options: SearchOptions, progress: Progress) -> SearchResult:
    """Search on what is measured here; every rank calls this."""
    model = build_model(recipe, seed=0)
    inputs, target = TrainingBatches(recipe, seed=0).first
    chain = chain_for(model, inputs, {}, recipe.cells)
    with recipe.precision():
        return search_plan(
            model,
            inputs,
            target=target,
            loss=recipe.loss,
            num_devices=options.num_devices,
            num_microbatches=options.num_microbatches,
            schedules=options.schedules,
            recompute=options.recompute,
            replicas=options.replicas,
            memory_bytes=options.memory_bytes,
            state_factor=state_factor(recipe, chain),
            progress=progress,
        )


def estimated_search(
    recipe: Recipe, options: SearchOptions, device: DeviceSpec, progress: Progress
) -> SearchResult:
    """Search for a device that is not here; its memory is the cap unless another is given."""
    model = meta_model(recipe)
    inputs, target = TrainingBatches(recipe, seed=0).first

    def costs_at(num_microbatches: int) -> tuple[CellCost, ...]:
        with recipe.precision():
            return stagewise.estimate(
                model,
                inputs,
                target=target,
                loss=recipe.loss,
                num_microbatches=num_microbatches,
                device=device,
            )

    return search(
        costs_at,
        options.num_devices,
        num_microbatches=candidates(
            options.num_microbatches, options.num_devices, batch_size((inputs, target))
        ),
        memory_bytes=options.memory_bytes or device.memory_bytes,
        link=device.link(options.num_devices),
        schedules=options.schedules,
        recompute=options.recompute,
        replicas=options.replicas,
        synthesis=options.schedules is None,
        state_factor=state_factor(recipe, chain_of(model)),
        progress=progress,
    )
