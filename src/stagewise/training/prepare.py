"""From a recipe and options to something that runs: model, data, plan, pipeline, optimizer."""

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import stagewise
from stagewise.costs import FREE_LINK, CellCost, LinkCost
from stagewise.engine.microbatch import batch_size
from stagewise.errors import (
    CheckpointError,
    ModelError,
    PlanError,
    RecipeError,
    ScheduleError,
    UsageError,
)
from stagewise.model.chain import chain_of, is_chain, module_tree
from stagewise.pipeline.capturing import chain_for
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning import Plan, ScheduleLike, check_balance, plan_from_costs
from stagewise.planning.partition import check_counts
from stagewise.training import checkpoint as checkpoints
from stagewise.training.batches import TrainingBatches, validation_batches
from stagewise.training.checkpoint import Checkpoint
from stagewise.training.recipe import Batch, Recipe, Tree

Model = nn.Module | Sequence[nn.Module]
Moved = tuple[Pipeline, Optimizer | None]
ADAPTIVE_COUNTS = (1, 2, 4, 8)  # microbatches per device that are tried
MEASURING_SECONDS = 6.0  # for all of them


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
class TrainOptions:
    """What to train, how long, and where to keep it; intervals are in steps, 0 means never."""

    plan: PlanOptions
    run: Path
    num_steps: int | None = None  # None: one pass over the recipe's data
    seed: int = 0
    validate_every: int = 100
    checkpoint_every: int = 100
    resume: Checkpoint | None = None

    @property
    def first_step(self) -> int:
        """How many steps are done when the run starts."""
        return self.resume.step if self.resume else 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A recipe made into something that runs."""

    pipe: Pipeline
    optimizer: Optimizer | None  # None on a rank without parameters
    batches: TrainingBatches
    validation: tuple[Batch, ...]
    num_steps: int
    measured: Mapping[int, tuple[CellCost, ...]]  # by microbatches, where these are adaptive


def prepare(recipe: Recipe, options: TrainOptions) -> Prepared:
    """Build everything, at the state that the run starts from; every rank calls this."""
    model = build_model(recipe, seed=options.seed, meta=recipe.meta)
    if options.resume is not None:
        checkpoints.check_fits(options.resume, parameter_shapes(model))
    batches = TrainingBatches(recipe, seed=options.seed)
    num_steps = _num_steps(recipe, options, batches)
    chain_for(model, batches.first[0], {}, recipe.cells)
    plan, measured = _chosen_plan(recipe, model, options.plan, batches.first)
    pipe = _pipeline(recipe, options, model, plan)
    del model  # the rest of it can go
    optimizer = recipe.make_optimizer(list(pipe.parameters()))
    if options.resume is not None:
        _restore(recipe, options.resume, pipe, optimizer)
        batches.skip(pipe.step_index)
    seed_everything(options.seed)
    return Prepared(
        pipe=pipe,
        optimizer=optimizer,
        batches=batches,
        validation=validation_batches(recipe),
        num_steps=num_steps,
        measured=measured,
    )


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


def moved(
    recipe: Recipe, options: TrainOptions, plan: Plan, checkpoint: Checkpoint, inputs: Tree
) -> Moved:
    """Pipeline and optimizer of another plan, at the state of `checkpoint`; every rank calls this.

    `inputs` are an example of what the model takes. What the recipe draws from is left as it was.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    model = build_model(recipe, seed=options.seed, meta=recipe.meta)
    chain_for(model, inputs, {}, recipe.cells)
    pipe = _pipeline(recipe, options, model, plan)
    del model
    optimizer = recipe.make_optimizer(list(pipe.parameters()))
    _restore(recipe, checkpoint, pipe, optimizer)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    return pipe, optimizer


def _restore(
    recipe: Recipe, checkpoint: Checkpoint, pipe: Pipeline, optimizer: Optimizer | None
) -> None:
    checkpoints.restore(checkpoint, pipe, optimizer)
    pipe.step_index = checkpoint.step * recipe.accumulate  # it counts batches


def _pipeline(recipe: Recipe, options: TrainOptions, model: Model, plan: Plan) -> Pipeline:
    return Pipeline(
        model,
        plan,
        loss=recipe.loss,
        weight=recipe.weight,
        seed=options.seed,
        init=recipe.init,
        accumulate_in_float32=recipe.accumulate_in_float32,
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


def check_form(recipe: Recipe, options: PlanOptions, resume: Checkpoint | None) -> None:
    """Find, before workers start, the mistakes that the model's form alone shows.

    The model is built on the meta device, without memory; one that cannot be is left to the
    workers, who find the same mistakes later.
    """
    try:
        with torch.device("meta"):
            model = recipe.model()
    except Exception:
        return
    known = not isinstance(model, nn.Module) or (is_chain(model) and recipe.cells is None)
    if known:  # else cells are known once captured
        chain = chain_of(model)
        check_counts(len(chain), options.num_stages)
        if options.balance is not None:
            check_balance(options.balance, len(chain), options.num_stages)
    if resume is not None:
        checkpoints.check_fits(resume, parameter_shapes(model))


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of all of the model's parameters, by name."""
    whole = model if isinstance(model, nn.Module) else module_tree(chain_of(model))
    named = whole.named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named}


def build_model(recipe: Recipe, *, seed: int, meta: bool = False) -> Model:
    """The recipe's model, the same on every rank; on the meta device it takes no memory."""
    seed_everything(seed)
    if meta:
        what = "model() under torch.device('meta'), as meta = True asks for,"
        with recipe.blame(what), torch.device("meta"):
            return recipe.model()
    with recipe.blame("model()"):
        return recipe.model()


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


def seed_everything(seed: int) -> None:
    """Seed what a recipe may draw from: torch, Python's random, NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _num_steps(recipe: Recipe, options: TrainOptions, batches: TrainingBatches) -> int:
    num_steps = options.num_steps
    if num_steps is None and batches.num_batches is not None:
        num_steps = max(batches.num_batches // recipe.accumulate, min(batches.num_batches, 1))
    if num_steps is None:
        raise RecipeError(
            f"data('train') in {recipe.path} does not tell its length, so the number of steps is "
            "unknown; give --steps"
        )
    if num_steps < 1:
        raise UsageError(f"the number of steps is {num_steps}; train for at least 1 step")
    if options.resume is not None and num_steps <= options.resume.step:
        raise CheckpointError(
            f"the checkpoint {options.resume.path} has {options.resume.step} steps done, so "
            f"there is nothing left of {num_steps}; give a larger --steps to train on"
        )
    return num_steps
