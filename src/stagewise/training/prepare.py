"""Build a run from a recipe and options: model, data, plan, pipeline, optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stagewise.checkpoints.loading import check
from stagewise.checkpoints.names import aliases_of
from stagewise.checkpoints.sources import open_source
from stagewise.costs import CellCost
from stagewise.engine.step.agreement import agreed
from stagewise.engine.transport.processes import named_device, own_device, own_rank
from stagewise.errors import CheckpointError, RecipeError, UsageError
from stagewise.mesh import MeshShape
from stagewise.model.cells_of import chain_for
from stagewise.model.chain import chain_of, is_chain, module_tree
from stagewise.pipeline.pipeline import Pipeline
from stagewise.pipeline.trials import warn_elsewhere
from stagewise.planning import Plan, check_balance
from stagewise.planning.choice import requested_schedule
from stagewise.planning.partition.balance import check_counts
from stagewise.planning.request import PlanRequest
from stagewise.training import checkpoint as checkpoints
from stagewise.training.batches import TrainingBatches, check_mesh, validation_batches
from stagewise.training.checkpoint_errors import explain_read_errors
from stagewise.training.mesh.data_parts import DataParts
from stagewise.training.plans import devices_of, make_plan, measured_choice
from stagewise.training.recipe import Batch, Model, Recipe, Tree, build_model
from stagewise.training.run_folder import NUM_KEPT, Checkpoint, check_fits
from stagewise.training.state.optimizers import check_groups
from stagewise.training.state.own_objects import Objects
from stagewise.training.state.pretrained import Pretrained, pretrained_of
from stagewise.training.state.random_states import (
    random_states_kept,
    restore_random_states,
    seed_everything,
)
from stagewise.training.state.run_state import Extra
from stagewise.training.state.schedules import check_heard
from stagewise.training.workers.elastic import Interrupted


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A pipeline, its optimizer and schedule; these are None on a rank that updates nothing.

    `objects` are the recipe's own, to be saved and restored.
    """

    pipe: Pipeline
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    objects: Objects


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train, how long, and where to save it; intervals are in steps, 0 means never."""

    plan: PlanRequest | Plan  # a Plan is used unchanged
    run: Path
    adaptive: bool = False  # microbatches are chosen by measuring, and changed during the run
    plan_file: Path | None = None  # where a Plan came from
    num_steps: int | None = None  # None: one pass over the recipe's data
    seed: int = 0
    validate_every: int = 100
    checkpoint_every: int = 100
    keep: int = NUM_KEPT  # of the last checkpoints
    init: Path | None = None  # a checkpoint of a model, for the initial values
    resume: Checkpoint | None = None
    interrupted: Interrupted | None = None  # of an earlier start of this launch
    agents: tuple[str, ...] = ()  # that have started the workers
    timeout: int = 600  # seconds that workers wait for each other
    replace: int = 0  # lost workers at most, by ones that find their state in memory
    record: int = 3  # steps at a time
    loggers: tuple[str, ...] = ()
    command: str = ""  # that would train so again
    mesh: MeshShape | None = None  # pipelines side by side

    @property
    def first_step(self) -> int:
        """The number of steps already done when the run starts."""
        return self.resume.step if self.resume else 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a run of a recipe needs."""

    trained: Trained
    batches: TrainingBatches
    validation: Mapping[str, tuple[Batch, ...]]  # by set
    num_steps: int
    measured: Mapping[int, tuple[CellCost, ...]]  # by number of microbatches, if adaptive
    pretrained: Pretrained | None  # of a model of transformers
    parts: DataParts  # of every batch, on a mesh


def prepare(recipe: Recipe, options: TrainOptions) -> Prepared:
    """Build everything in the state from which the run starts; every rank calls this."""
    model = build_model(recipe, seed=options.seed, meta=recipe.meta)
    pretrained = pretrained_of(model, recipe.tokenizer)
    _check_values(recipe, model, options.resume, options.init)
    batches = TrainingBatches(recipe, seed=options.seed)
    num_steps = _num_steps(recipe, options, batches)
    parts = DataParts.of(recipe.mesh, options.mesh, own_rank())
    part = parts.every(batches.first)[0]  # the largest
    chain_for(model, part[0], {}, recipe.cells)
    plan, measured = _planned(recipe, options, model, part)
    pipe = _pipeline(recipe, options, model, plan, None if options.resume else options.init)
    del model  # frees the stages of other ranks
    _agree_on_length(recipe, pipe, num_steps)
    trained = _trained(recipe, pipe)
    if options.resume is not None:
        restored = restore_from(recipe, options.resume, trained)
        batches.go_to(pipe.step_index, restored.data)
    seed_everything(options.seed)
    validation = validation_batches(recipe)
    with agreed(pipe.ranks, "checking the schedule"):
        validates = bool(validation) and options.validate_every > 0
        check_heard(recipe.path, trained.scheduler, validates=validates)
    if options.resume is not None and restored.random is not None:
        with explain_read_errors(options.resume):
            restore_random_states(restored.random, pipe.device)
    return Prepared(
        trained=trained,
        batches=batches,
        validation=validation,
        num_steps=num_steps,
        measured=measured,
        pretrained=pretrained,
        parts=parts,
    )


def _planned(
    recipe: Recipe, options: TrainOptions, model: Model, batch: Batch
) -> tuple[Plan, Mapping[int, tuple[CellCost, ...]]]:
    """Return the plan, and the measured costs if microbatches are adaptive."""
    if isinstance(options.resume, checkpoints.Remembered):
        return options.resume.plan, {}
    if isinstance(options.plan, Plan):
        warn_elsewhere(options.plan, own_device())
        return options.plan, {}
    if options.adaptive and not recipe.meta:
        kept, num_devices = options.resume, requested_schedule(options.plan).num_devices
        same = kept is not None and kept.num_devices == num_devices
        number = kept.num_microbatches if kept is not None and same else None
        return measured_choice(recipe, model, options.plan, batch, number)
    return make_plan(recipe, model, options.plan, batch=batch), {}


def rebuild(
    recipe: Recipe,
    options: TrainOptions,
    plan: Plan,
    inputs: Tree,
    fill: Callable[[Trained], object],
) -> Trained:
    """Build pipeline and optimizer for another plan, which `fill` restores; every rank calls this.

    `inputs` are an example of the model's inputs. Random states are left unchanged.
    """
    with random_states_kept():
        model = build_model(recipe, seed=options.seed, meta=recipe.meta)
        chain_for(model, inputs, {}, recipe.cells)
        pipe = _pipeline(recipe, options, model, plan)
        del model
        trained = _trained(recipe, pipe)
        fill(trained)
    return trained


def _trained(recipe: Recipe, pipe: Pipeline) -> Trained:
    """Build this rank's optimizer and schedule; raise RecipeError if no rank updates anything."""
    named = dict(pipe.named_parameters())
    with agreed(pipe.ranks, "making the optimizer"):
        optimizer = recipe.make_optimizer([*named.values()], [*named])
        scheduler = recipe.make_scheduler(optimizer)
        objects = recipe.make_objects(pipe.module)
    if not pipe.any(optimizer is not None) and pipe.any(bool(named)):
        raise RecipeError(
            f"optimizer(parameters) in {recipe.path} uses none of the model's parameters on any "
            "rank, so nothing would be trained; make it use some"
        )
    return Trained(pipe=pipe, optimizer=optimizer, scheduler=scheduler, objects=objects)


def restore_from(recipe: Recipe, checkpoint: Checkpoint, trained: Trained) -> checkpoints.Restored:
    """Give a pipeline and what belongs to it the state in `checkpoint`; every rank calls this."""
    pipe = trained.pipe
    extra = Extra(scheduler=trained.scheduler, objects=trained.objects)
    restored = checkpoints.restore(checkpoint, pipe, trained.optimizer, extra)
    pipe.step_index = checkpoint.step * recipe.accumulate  # counts batches
    return restored


def _pipeline(
    recipe: Recipe, options: TrainOptions, model: Model, plan: Plan, init: Path | None = None
) -> Pipeline:
    """Build the pipeline; from `init` if given, with the dtypes of a model on the meta device."""
    pipe = Pipeline(
        model,
        plan,
        loss=recipe.loss,
        weight=recipe.weight,
        seed=options.seed,
        devices=devices_of(options.plan, plan.num_devices),
        init=recipe.init,
        accumulate_in_float32=recipe.accumulate_in_float32,
        find_nonfinite=recipe.find_nonfinite,
        compare_batches=recipe.compare_batches,
        batch_dim=recipe.batch_dim,
        loss_reduction=recipe.loss_reduction,
        state=init if recipe.meta else None,
        **recipe.mesh.options(options.mesh),
    )
    if init is not None and not recipe.meta:
        pipe.load_checkpoint(init, convert=True)
    return pipe


def check_form(
    recipe: Recipe,
    plan: PlanRequest | Plan,
    resume: Checkpoint | None = None,
    init: Path | None = None,
    mesh: MeshShape | None = None,
) -> None:
    """Find mistakes that the model's structure alone shows, before workers start.

    The model is built on the meta device; if that fails, the workers find the same mistakes later.
    """
    if mesh is not None:
        check_mesh(recipe, mesh, plan)
    if isinstance(plan, PlanRequest):
        list(map(named_device, plan.device_names))
    try:
        with torch.device("meta"):
            model = recipe.model()
    except Exception:
        return
    known = not isinstance(model, nn.Module) or (is_chain(model) and recipe.cells is None)
    if known:  # otherwise the cells are only known after capture
        chain = chain_of(model)
        num_stages = (plan if isinstance(plan, Plan) else requested_schedule(plan)).num_stages
        check_counts(len(chain), num_stages)
        if plan.balance is not None:
            check_balance(plan.balance, len(chain), num_stages)
    _check_values(recipe, model, resume, init)


def _check_values(
    recipe: Recipe, model: Model, resume: Checkpoint | None, init: Path | None
) -> None:
    """Raise CheckpointError unless the values to start from are those of such a model."""
    whole = model if isinstance(model, nn.Module) else module_tree(chain_of(model))
    check_groups(recipe.path, recipe.groups, [name for name, _ in whole.named_parameters()])
    if resume is not None:
        check_fits(resume, {n: tuple(p.shape) for n, p in whole.named_parameters()})
    elif init is not None:
        names = aliases_of(whole)
        tensors = {n: t for n, t in whole.state_dict().items() if isinstance(t, torch.Tensor)}
        check(open_source(init, names), tensors, names, convert=not recipe.meta)


def _agree_on_length(recipe: Recipe, pipe: Pipeline, num_steps: int) -> None:
    """Raise RecipeError on every rank if the ranks' data have different lengths."""
    numbers = pipe.ranks.gather_all(num_steps, "the number of steps")
    if len(set(numbers)) > 1:
        listed = ", ".join(f"rank {rank}: {number}" for rank, number in enumerate(numbers))
        raise RecipeError(
            f"data('train') in {recipe.path} gives different numbers of steps on different ranks "
            f"({listed}), so some would wait forever; give all ranks the same data, or --steps"
        )


def _num_steps(recipe: Recipe, options: TrainOptions, batches: TrainingBatches) -> int:
    num_steps = options.num_steps
    if num_steps is None and batches.num_batches is not None:
        num_steps = max(batches.num_batches // recipe.accumulate, min(batches.num_batches, 1))
    if num_steps is None:
        raise RecipeError(
            f"data('train') in {recipe.path} has no length, so the number of steps is unknown; "
            "give --steps"
        )
    if num_steps < 1:
        raise UsageError(f"the number of steps is {num_steps}; train for at least 1 step")
    done = options.resume  # a run that is started again may be complete
    if done is not None and num_steps < done.step + (options.interrupted is None):
        raise CheckpointError(
            f"the checkpoint {done.path} already has {done.step} of {num_steps} steps; give a "
            "larger --steps to continue training"
        )
    return num_steps
