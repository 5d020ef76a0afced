"""The plan of a recipe: measured here, estimated for a device, or searched for."""

from contextlib import suppress
from dataclasses import replace

from stagewise.batch.split import batch_size
from stagewise.costs import CellCost
from stagewise.errors import ModelError, ScheduleError
from stagewise.model.chain import chain_of
from stagewise.pipeline.plan import measured_plan, search_plan
from stagewise.planning import Plan, SearchResult
from stagewise.planning.choice import requested_schedule
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.partition.balance import check_counts
from stagewise.planning.plan import plan_for
from stagewise.planning.request import PlanRequest
from stagewise.planning.search.search import Progress, search_for
from stagewise.training.batches import TrainingBatches
from stagewise.training.recipe import Batch, Model, Recipe, build_model
from stagewise.training.recipe_costs import (
    estimate_recipe,
    estimated,
    meta_model,
    num_samples_of,
    recipe_example,
    sizes_as_costs,
    state_factor,
)

ADAPTIVE_COUNTS = (1, 2, 4, 8)  # microbatches per device that are tried
MEASURING_SECONDS = 6.0  # for all of them


def measured_choice(
    recipe: Recipe, model: Model, request: PlanRequest, batch: Batch
) -> tuple[Plan, dict[int, tuple[CellCost, ...]]]:
    """The fastest of several numbers of microbatches, and the costs measured for each.

    The request's own number is taken where none of them can be had.
    """
    num_samples, num_devices = (
        batch_size(batch[0], "inputs"),
        requested_schedule(request).num_devices,
    )
    counts = [n for each in ADAPTIVE_COUNTS if (n := each * num_devices) <= num_samples]
    counts = counts or [num_samples]
    plans = {}
    for count in counts:
        with suppress(ScheduleError):  # not every schedule takes every number
            plans[count] = make_plan(
                recipe,
                model,
                replace(request, num_microbatches=count),
                batch=batch,
                seconds=MEASURING_SECONDS / len(counts),
            )
    if not plans:
        return make_plan(recipe, model, request, batch=batch), {}
    fastest = min(plans.values(), key=lambda plan: plan.timeline.duration_seconds)
    return fastest, {count: plan.cells for count, plan in plans.items()}


def make_plan(
    recipe: Recipe, model: Model, request: PlanRequest, *, batch: Batch, seconds: float = 3.0
) -> Plan:
    """The plan measured on `batch` for about `seconds`; every rank calls this.

    What is on the meta device cannot be measured: see `plan_on_meta`.
    """
    if recipe.meta:
        return plan_on_meta(recipe, model, request, batch=batch)
    with recipe.precision():
        return measured_plan(request, recipe_example(recipe, model, batch), seconds=seconds)


def plan_on_meta(recipe: Recipe, model: Model, request: PlanRequest, *, batch: Batch) -> Plan:
    """A plan that predicts nothing, its cut made by estimated work.

    The estimate's device is a plain server, so how long cells take beside each other is of use
    here, and their seconds are not. Where a cell cannot be estimated, parameters count as work.
    """
    assert isinstance(request.num_microbatches, int)
    try:
        cells = estimated(recipe, model, batch, request.num_microbatches, "cpu")
    except ModelError:
        cells = sizes_as_costs(model)
    return replace(plan_for(request, cells), cells=())


def estimated_plan(recipe: Recipe, request: PlanRequest, device: DeviceSpec) -> Plan:
    """The plan for `device`."""
    choice = requested_schedule(request)
    found = estimate_recipe(recipe, device, choice.built.num_microbatches)
    check_counts(len(found.cells), choice.num_stages)
    return plan_for(request, found.cells, link=device.link(choice.num_devices))


def measured_search(recipe: Recipe, request: PlanRequest, progress: Progress) -> SearchResult:
    """Search on what is measured here; every rank calls this."""
    model, batch = build_model(recipe, seed=0), TrainingBatches(recipe, seed=0).first
    with recipe.precision():
        example = recipe_example(recipe, model, batch)
        request = replace(request, state_factor=state_factor(recipe, example.chain))
        return search_plan(request, example, progress=progress)


def estimated_search(
    recipe: Recipe, request: PlanRequest, device: DeviceSpec, progress: Progress
) -> SearchResult:
    """Search for a device that is not here; its memory is the cap unless another is given."""
    assert request.num_devices is not None
    model, batch = meta_model(recipe), TrainingBatches(recipe, seed=0).first
    return search_for(
        replace(
            request,
            memory_bytes=request.memory_bytes or device.memory_bytes,
            state_factor=state_factor(recipe, chain_of(model)),
        ),
        lambda count: estimated(recipe, model, batch, count, device),
        request.counts(num_samples_of(batch)),
        link=device.link(request.num_devices),
        progress=progress,
    )
