"""The plan of a recipe: measured here, estimated for a device, or searched for."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from stagewise.batch.split import batch_size
from stagewise.costs import CellCost
from stagewise.engine.transport.connect import Device
from stagewise.engine.transport.processes import devices_here
from stagewise.errors import ModelError, PlanError, ScheduleError
from stagewise.model.chain import chain_of
from stagewise.pipeline.plan_model import measured_plan
from stagewise.pipeline.searched_plan import search_plan
from stagewise.planning import Plan, SearchResult
from stagewise.planning.alternatives import Outlook, outlook_of
from stagewise.planning.choice import requested_schedule
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.partition.balance import check_counts
from stagewise.planning.plan import plan_for
from stagewise.planning.request import PlanRequest
from stagewise.planning.reserve import reserve_of
from stagewise.planning.search.search import Progress, search_for
from stagewise.report.outlook_words import pace_in_words
from stagewise.slow_notice import told
from stagewise.training.batches import TrainingBatches, amount_of
from stagewise.training.recipe import Batch, Model, Recipe, build_model
from stagewise.training.recipe_costs import (
    estimate_recipe,
    estimated,
    meta_model,
    num_samples_of,
    recipe_example,
    room_of,
    sizes_as_costs,
    state_factor,
)

ADAPTIVE_COUNTS = (1, 2, 4, 8)  # microbatches per device to try
MEASURING_SECONDS = 6.0  # in total


def measured_choice(
    recipe: Recipe, model: Model, request: PlanRequest, batch: Batch, kept: int | None = None
) -> tuple[Plan, dict[int, tuple[CellCost, ...]]]:
    """Return the fastest plan of several numbers of microbatches, and the costs of each.

    A resumed run goes on with the number that it has `kept`, on which dropout depends. If the
    schedule allows none of them, the plan has the request's number.
    """
    num_samples, num_devices = (
        batch_size(batch[0], "inputs"),
        requested_schedule(request).num_devices,
    )
    counts = [n for each in ADAPTIVE_COUNTS if (n := each * num_devices) <= num_samples]
    kept = None if kept is None or kept > num_samples else kept
    counts = sorted({*(counts or [num_samples]), *([] if kept is None else [kept])})
    plans = {}
    for count in counts:
        with suppress(ScheduleError):  # not every schedule allows every number
            plans[count] = make_plan(
                recipe,
                model,
                replace(request, num_microbatches=count),
                batch=batch,
                seconds=MEASURING_SECONDS / len(counts),
            )
    if not plans:
        return make_plan(recipe, model, request, batch=batch), {}
    chosen = min(plans.values(), key=lambda plan: plan.timeline.duration_seconds)
    if kept is not None:
        chosen = plans.get(kept, chosen)
    return chosen, {count: plan.cells for count, plan in plans.items()}


def devices_of(wanted: PlanRequest | Plan, number: int) -> Sequence[Device] | None:
    """Return the devices that are named for a plan of so many, else those of one process.

    After workers were lost there are fewer than were named.
    """
    names = () if isinstance(wanted, Plan) else wanted.device_names
    return names if len(names) == number else devices_here(number)


def make_plan(
    recipe: Recipe, model: Model, request: PlanRequest, *, batch: Batch, seconds: float = 3.0
) -> Plan:
    """Return a plan measured on `batch` for about `seconds`; every rank calls this.

    A model on the meta device cannot be measured: see `plan_on_meta`.
    """
    if recipe.meta:
        return plan_on_meta(recipe, model, request, batch=batch)
    if request.memory_bytes is not None:
        with recipe.precision():
            example = recipe_example(recipe, model, batch, request.device_names)
            request = replace(request, state_factor=state_factor(recipe, example.chain))
            return search_plan(request, example, seconds=seconds).plan
    with recipe.precision():
        example = recipe_example(recipe, model, batch, request.device_names)
        return measured_plan(request, example, seconds=seconds)


def plan_on_meta(recipe: Recipe, model: Model, request: PlanRequest, *, batch: Batch) -> Plan:
    """Return a plan without predictions, cut by estimated work.

    The estimate is for a generic server, so only the cells' relative times are meaningful. If a
    cell cannot be estimated, its number of parameters is used instead.
    """
    assert isinstance(request.num_microbatches, int)
    if request.memory_bytes is not None:
        raise PlanError(
            "a model on the meta device is cut without measuring what fits; leave --memory out, or "
            "train with --plan and a file that stagewise plan --device DEVICE --json wrote"
        )
    try:
        cells = estimated(recipe, model, batch, request.num_microbatches, "cpu")
    except ModelError:
        cells = sizes_as_costs(model)
    return replace(plan_for(request, cells), cells=())


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """A plan with, if its cells have costs, what becomes of it on its devices."""

    plan: Plan
    outlook: Outlook | None
    pace: str | None  # in words


def foreseen_plan(recipe: Recipe, request: PlanRequest, device: DeviceSpec | None) -> Foreseen:
    """Return the plan estimated for `device`, or measured here; every rank calls this."""
    batches = TrainingBatches(recipe, seed=0)
    if device is None:
        with told("measuring the model's cells"):
            model = build_model(recipe, seed=0, meta=recipe.meta)
            plan = make_plan(recipe, model, request, batch=batches.first)
    else:
        choice = requested_schedule(request)
        with told(f"estimating the model's cells for {device.name}"):
            found = estimate_recipe(recipe, device, choice.built.num_microbatches)
        check_counts(len(found.cells), choice.num_stages)
        with told(f"cutting {len(found.cells)} cells into {choice.num_stages} stages"):
            plan = plan_for(request, found.cells, link=device.link(choice.num_devices))
        model = found.model
    if not plan.cells:
        return Foreseen(plan=plan, outlook=None, pace=None)
    room = room_of(recipe, chain_of(model), device, plan.num_devices)
    number, steps = recipe.accumulate, batches.num_batches
    amount, unit = amount_of(batches.first)
    seconds = plan.timeline.duration_seconds * number
    passes = None if steps is None else max(1, steps // number)
    return Foreseen(
        plan=plan,
        outlook=outlook_of(plan, room),
        pace=pace_in_words(seconds, amount * number, unit, passes),
    )


def measured_search(
    recipe: Recipe, request: PlanRequest, progress: Progress, *, seconds: float | None = None
) -> SearchResult:
    """Search with costs measured here, and try the best plans; every rank calls this."""
    model, batch = build_model(recipe, seed=0), TrainingBatches(recipe, seed=0).first
    with recipe.precision():
        example = recipe_example(recipe, model, batch, request.device_names)
        request = replace(request, state_factor=state_factor(recipe, example.chain))
        return search_plan(request, example, seconds=seconds, progress=progress)


def estimated_search(
    recipe: Recipe, request: PlanRequest, device: DeviceSpec, progress: Progress
) -> SearchResult:
    """Search with costs estimated for `device`, whose memory is the cap unless one is given."""
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
        reserve=reserve_of("cpu" if device.name == "cpu" else "cuda", posts=True),
        progress=progress,
    )
