"""What a recipe costs, estimated for a device or measured here, and what else advice needs."""

import os
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import stagewise
from stagewise.batch.split import batch_size, extent
from stagewise.costs import FREE_LINK, CellCost, LinkCost
from stagewise.errors import (
    BatchError,
    ModelError,
    PlanError,
    ScheduleError,
)
from stagewise.model.cell import Chain
from stagewise.model.cells_of import chain_for
from stagewise.model.chain import chain_of
from stagewise.pipeline.plan import Microbatches, candidates, search_plan
from stagewise.planning import (
    Plan,
    ScheduleLike,
    SearchResult,
    plan_from_costs,
    search,
)
from stagewise.planning.advise import MICROBATCHES_PER_STAGE
from stagewise.planning.advise_facts import Facts
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.partition.balance import check_counts
from stagewise.planning.search.search import Progress
from stagewise.profiling.fakes import likeness
from stagewise.training.batches import TrainingBatches
from stagewise.training.recipe import Batch, Model, Recipe, build_model, seed_everything

_PROBE = 64  # parameters, to see what an optimizer keeps for each


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How the model is to be cut and run."""

    num_stages: int
    num_microbatches: int
    num_devices: int | None = None  # None: as many as the schedule needs
    replicas: tuple[int, ...] = ()  # devices per stage
    schedule: ScheduleLike = "1f1b"
    recompute: str = "never"
    balance: tuple[int, ...] | None = None
    saved: Plan | None = None  # a whole plan; the numbers above are its own
    path: Path | None = None  # of the saved plan
    adaptive: bool = False  # microbatches are chosen, and changed in the run


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """A recipe's cells, and the model and first batch that they were estimated from."""

    cells: tuple[CellCost, ...]
    chain: Chain
    batch_size: int


def estimate_recipe(recipe: Recipe, device: DeviceSpec, num_microbatches: int) -> Estimated:
    """Estimate a recipe's cells; the model is built on the meta device."""
    model = meta_model(recipe)
    inputs, target = TrainingBatches(recipe, seed=0).first
    with recipe.precision():
        cells = stagewise.estimate(
            model,
            inputs,
            target=target,
            loss=recipe.loss,
            num_microbatches=num_microbatches,
            device=device,
        )
    return Estimated(
        cells=cells, chain=chain_of(model), batch_size=num_samples_of((inputs, target))
    )


def estimated_plan(recipe: Recipe, options: PlanOptions, device: DeviceSpec) -> Plan:
    """The plan for `device`."""
    found = estimate_recipe(recipe, device, options.num_microbatches)
    check_counts(len(found.cells), options.num_stages)
    link = device.link(options.num_devices or options.num_stages)
    return plan_of_costs(found.cells, options, link)


def facts_of(
    recipe: Recipe,
    device: DeviceSpec | None,
    *,
    num_devices: int,
    device_memory_bytes: int | None,
    num_microbatches: int | None,
) -> Facts:
    """What the rules of `stagewise advise` ask for; measured here if `device` is None."""
    if num_microbatches is None:
        size = num_samples_of(TrainingBatches(recipe, seed=0).first)
        num_microbatches = min(MICROBATCHES_PER_STAGE * num_devices, size)
    if device is None:
        found = _measured(recipe, num_microbatches)
        memory, link = _memory_here() // num_devices, FREE_LINK
    else:
        found = estimate_recipe(recipe, device, num_microbatches)
        memory, link = device.memory_bytes, device.link(num_devices)
    return Facts(
        cells=found.cells,
        num_devices=num_devices,
        device_memory_bytes=device_memory_bytes or memory,
        batch_size=found.batch_size,
        num_microbatches=num_microbatches,
        state_factor=state_factor(recipe, found.chain),
        link=link,
        has_batchnorm=any(
            isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
            for cell in found.chain
            for module in cell.module.modules()
        ),
        num_experts=num_experts(found.chain),
    )


def meta_model(recipe: Recipe) -> Model:
    """The recipe's model on the meta device."""
    seed_everything(0)
    with recipe.blame("model() on the meta device"), torch.device("meta"):
        return recipe.model()


def state_factor(recipe: Recipe, chain: Chain) -> float:
    """Bytes kept for a byte of parameters: itself, its gradient, and the optimizer's state.

    The optimizer makes one step on a few parameters of the model's first dtype.
    """
    dtypes = [p.dtype for cell in chain for p in cell.module.parameters() if p.requires_grad]
    if not dtypes:
        return 1.0
    probe = nn.Parameter(torch.zeros(_PROBE, dtype=dtypes[0]))
    probe.grad = torch.zeros_like(probe)
    optimizer = recipe.make_optimizer([probe])
    assert optimizer is not None
    with recipe.blame("a step of the optimizer"):
        optimizer.step()
    state = optimizer.state.get(probe, {}).values()
    kept = sum(t.nbytes for t in state if isinstance(t, torch.Tensor) and t.numel() >= _PROBE)
    return 2.0 + kept / probe.nbytes


def num_experts(chain: Chain) -> dict[int, int]:
    """Per cell: how many alike parts, in a list, hold most of its parameters."""
    found = {}
    for cell in chain:
        whole = sum(p.numel() for p in cell.module.parameters())
        for module in cell.module.modules():
            if not isinstance(module, nn.ModuleList) or len(module) < 2:
                continue
            kinds: set[Hashable] = {likeness(part) for part in module}
            inside = sum(p.numel() for p in module.parameters())
            if len(kinds) == 1 and 2 * inside > whole:
                found[cell.index] = len(module)
    return found


def _measured(recipe: Recipe, num_microbatches: int) -> Estimated:
    model = build_model(recipe, seed=0)
    inputs, target = TrainingBatches(recipe, seed=0).first
    with recipe.precision():
        plan = stagewise.plan(
            model,
            inputs,
            target=target,
            loss=recipe.loss,
            num_stages=1,
            num_microbatches=num_microbatches,
            cells=recipe.cells,
        )
    size = num_samples_of((inputs, target))
    return Estimated(cells=plan.cells, chain=chain_of(model), batch_size=size)


def num_samples_of(batch: Batch) -> int:
    """How many samples a minibatch has; raises BatchError where nothing has any."""
    size = extent([("inputs", batch[0]), ("target", batch[1])]).num_samples
    if size is None:
        raise BatchError(
            "the recipe's batches hold no tensor with samples; put samples along dimension 0"
        )
    return size


def _memory_here() -> int:
    """Bytes of this machine that training may use: its GPUs' if there are any, else its own."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return sum(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


ADAPTIVE_COUNTS = (1, 2, 4, 8)  # microbatches per device that are tried


MEASURING_SECONDS = 6.0  # for all of them


def saved_plan(path: Path) -> PlanOptions:
    """A plan from a file, as `stagewise plan --json` writes it; raises PlanError if it is none."""
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"the plan {path} cannot be read ({error}); write one with stagewise plan RECIPE "
            f"--json > {path}"
        ) from error
    return PlanOptions(
        num_stages=plan.num_stages,
        num_microbatches=plan.num_microbatches,
        num_devices=plan.num_devices,
        balance=plan.balance,
        saved=plan,
        path=path,
    )


def _chosen_plan(
    recipe: Recipe, model: Model, options: PlanOptions, batch: Batch
) -> tuple[Plan, dict[int, tuple[CellCost, ...]]]:
    """The plan; if it is adaptive, the fastest of several numbers of microbatches, all measured."""
    if not options.adaptive or recipe.meta:
        return make_plan(recipe, model, options, batch=batch), {}
    num_samples = batch_size(batch[0], "inputs")
    num_devices = options.num_devices or sum(options.replicas) or options.num_stages
    counts = [n * num_devices for n in ADAPTIVE_COUNTS if n * num_devices <= num_samples]
    plans = {}
    for count in counts or [num_samples]:
        with suppress(ScheduleError):  # not every schedule takes every number
            chosen = replace(options, num_microbatches=count)
            plans[count] = make_plan(
                recipe, model, chosen, batch=batch, seconds=MEASURING_SECONDS / len(counts or [1])
            )
    if not plans:
        return make_plan(recipe, model, options, batch=batch), {}
    fastest = min(plans.values(), key=lambda plan: plan.timeline.duration_seconds)
    return fastest, {count: plan.cells for count, plan in plans.items()}


def make_plan(
    recipe: Recipe, model: Model, options: PlanOptions, *, batch: Batch, seconds: float = 3.0
) -> Plan:
    """The plan measured on `batch` for about `seconds`; every rank calls this.

    What is on the meta device cannot be measured: see `plan_on_meta`. A saved plan is taken as it
    is.
    """
    if options.saved is not None:
        return options.saved
    if recipe.meta:
        return plan_on_meta(recipe, model, options, batch=batch)
    inputs, target = batch
    with recipe.precision():
        return stagewise.plan(
            model,
            inputs,
            target=target,
            loss=recipe.loss,
            num_stages=options.num_stages,
            num_devices=options.num_devices,
            replicas=options.replicas,
            num_microbatches=options.num_microbatches,
            schedule=options.schedule,
            recompute=options.recompute,
            balance=options.balance,
            seconds=seconds,
            cells=recipe.cells,
        )


def plan_on_meta(recipe: Recipe, model: Model, options: PlanOptions, *, batch: Batch) -> Plan:
    """A plan that predicts nothing, its cut made by estimated work.

    The estimate's device is a plain server, so how long cells take beside each other is of use
    here, and their seconds are not. Where a cell cannot be estimated, parameters count as work.
    """
    inputs, target = batch
    try:
        with recipe.precision():
            cells = stagewise.estimate(
                model,
                inputs,
                target=target,
                loss=recipe.loss,
                num_microbatches=options.num_microbatches,
                device="cpu",
            )
    except ModelError:
        cells = sizes_as_costs(model)
    return replace(plan_of_costs(cells, options), cells=())


def plan_of_costs(
    cells: Sequence[CellCost], options: PlanOptions, link: LinkCost = FREE_LINK
) -> Plan:
    """The plan that `options` ask for, by costs that are known."""
    return plan_from_costs(
        cells,
        num_stages=options.num_stages,
        num_devices=options.num_devices,
        replicas=options.replicas,
        num_microbatches=options.num_microbatches,
        schedule=options.schedule,
        recompute=options.recompute,
        balance=options.balance,
        link=link,
    )


def sizes_as_costs(model: Model) -> tuple[CellCost, ...]:
    """Each cell's number of parameters as its seconds."""
    return tuple(
        CellCost(name=cell.name, forward_seconds=size, backward_seconds=2 * size)
        for cell in chain_of(model)
        for size in [float(sum(p.numel() for p in cell.module.parameters()))]
    )


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What the search goes over; see `stagewise.planning.search.search`."""

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
            options.num_microbatches, options.num_devices, num_samples_of((inputs, target))
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
