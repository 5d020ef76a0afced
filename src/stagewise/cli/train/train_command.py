"""`stagewise train`: check the options, start one worker per device, train, print the result."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from rich.console import Console

from stagewise.cli import options as opt
from stagewise.cli.closed_terminal import Terminal
from stagewise.cli.train import train_options as run
from stagewise.cli.train.run_place import IF_ANY, RunPlace, agreed_place, asked_place
from stagewise.cli.train.wanted import num_devices_of, wanted_of
from stagewise.cli.typed import DEFAULT_MICROBATCHES, Typed, command_line, words_of
from stagewise.cli.workers import end_with, report_errors_once, run_in_workers
from stagewise.errors import RecipeError, UsageError
from stagewise.page.dashboard import live_page
from stagewise.planning.plan import Plan
from stagewise.planning.request import AUTO
from stagewise.training.workers.environment import (
    INTERRUPTED_EXIT_CODE,
    launched,
    rank_here,
)

if TYPE_CHECKING:
    from stagewise.training.prepare import TrainOptions
    from stagewise.training.recipe import Recipe
    from stagewise.training.run_folder import Checkpoint
    from stagewise.training.workers.lifeline import Lifeline

_DEFAULTS = {
    "--microbatches": str(DEFAULT_MICROBATCHES),
    "--schedule": "1f1b",
    "--recompute": "never",
    "--validate-every": 100,
    "--checkpoint-every": 100,
    "--keep": 2,
    "--record": 3,
    "--replace-lost": 0,
    "--timeout": opt.DEFAULT_TIMEOUT,
}
_IN_CHECKPOINT = ("--seed", "--out", "--init", "--resume")  # implied by --resume RUN


def train(
    recipe: opt.RecipeArgument,
    stages: opt.Stages = None,
    devices: opt.Devices = None,
    replicas: opt.Replicas = None,
    microbatches: opt.AdaptiveMicrobatches = None,
    schedule: opt.ScheduleName = "1f1b",
    recompute: opt.Recompute = "never",
    balance: opt.Balance = None,
    memory: opt.Memory = None,
    speeds: opt.Speeds = None,
    mesh: run.Mesh = None,
    pipeline: run.Pipeline = None,
    shard: run.Shard = None,
    tensor: run.Tensor = None,
    plan: run.SavedPlan = None,
    steps: run.Steps = None,
    seed: opt.Seed = None,
    out: run.Out = None,
    init: run.Init = None,
    resume: run.Resume = None,
    validate_every: run.ValidateEvery = 100,
    checkpoint_every: run.CheckpointEvery = 100,
    keep: run.Keep = 2,
    restarts: run.Restarts = 0,
    replace_lost: run.Replace = 0,
    record: run.Record = 3,
    log: run.Log = "",
    timeout: opt.Timeout = opt.DEFAULT_TIMEOUT,
    dashboard: run.Dashboard = False,
    config: run.Config = None,
    no_config: run.NoConfig = False,
) -> None:
    """Train the model of a recipe through a pipeline.

    Starts one worker process per device, or joins the workers that `torchrun` has started. The
    model's cells are measured first and cut so that the stages are equally busy. Progress goes to
    the screen and to OUT/log.jsonl, checkpoints to OUT/checkpoints. Ctrl-C ends the run after the
    current step, with a checkpoint and exit code 130; continue with --resume. With --restarts, or
    under `torchrun --max-restarts`, a run goes on from its newest checkpoint when a worker dies;
    torchrun may then start fewer workers or more (--nnodes 1:4), and the model is cut anew.

    Example: stagewise train examples/shakespeare.py --stages 2
    """
    with report_errors_once() as lifeline:
        RecipeError.unless_file(recipe)
        if config is not None and (not launched() or rank_here() == 0):
            print(f"options from {config}, unless the command line gives them", flush=True)
        # The lines that start workers, or resume, give what the file did.
        flags = ("--no-config",) if no_config or config is not None else ()
        typed = Typed(
            schedule=schedule,
            recompute=recompute,
            stages=stages,
            devices=devices,
            replicas=replicas,
            microbatches=microbatches,
            balance=balance,
            memory=memory,
            speeds=speeds,
        )
        asked_mesh = run.AskedMesh(mesh=mesh, pipeline=pipeline, shard=shard, tensor=tensor)
        wanted, shape = wanted_of(typed, plan, asked_mesh)
        if shape is not None and microbatches == AUTO:
            raise UsageError(
                "--microbatches auto measures one pipeline while it trains, but on the mesh "
                f"{shape} several run side by side; give a number"
            )
        if replace_lost:
            run.check_replaced(shape, adaptive=microbatches == AUTO)
        from stagewise.training.metrics.metric_loggers import loggers_named
        from stagewise.training.prepare import TrainOptions, check_form
        from stagewise.training.recipe import load_recipe

        loaded = load_recipe(recipe)
        loggers = loggers_named(log)
        asked = partial(asked_place, loaded.name, out, resume, init)
        place = None if launched() else asked()  # workers agree on it once they have met

        def options_at(place: RunPlace) -> TrainOptions:
            return TrainOptions(
                plan=wanted,
                plan_file=plan,
                adaptive=microbatches == AUTO,
                run=place.run,
                num_steps=steps,
                seed=_seed(seed, place.checkpoint),
                validate_every=validate_every,
                checkpoint_every=checkpoint_every,
                keep=keep,
                init=place.init,
                resume=place.checkpoint,
                interrupted=place.interrupted,
                agents=tuple(place.agents),
                timeout=timeout,
                replace=replace_lost,
                record=record,
                loggers=loggers,
                mesh=shape,
            )

        with live_page(place.run if dashboard and place else None):
            run_in_workers(
                num_devices_of(wanted) if shape is None else shape.num_ranks,
                [] if place is None else _arguments(recipe, options_at(place), flags),
                before=lambda: check_form(
                    loaded,
                    wanted,
                    place.checkpoint if place else None,
                    place.init if place else None,
                    shape,
                ),
                body=lambda: _run(
                    loaded,
                    options_at(place or agreed_place(loaded.name, out, asked)),
                    lifeline,
                    flags,
                    shown=dashboard and place is None,
                ),
                timeout=timeout,
                restarts=restarts,
                may_share=shape is None,
            )


def _run(
    recipe: "Recipe",
    options: "TrainOptions",
    lifeline: "Lifeline | None",
    flags: Sequence[str],
    *,
    shown: bool,
) -> None:
    """Train on every worker; rank 0 prints the result, and serves the page if it is `shown`."""
    from stagewise.engine.transport.processes import is_first
    from stagewise.training.outcome import print_result
    from stagewise.training.trainer import run_training
    from stagewise.training.workers.stop import stop_request

    command = shlex.join(["stagewise", *_arguments(recipe.path, options, flags, short=True)])
    options = replace(options, command=command)
    console = Console(file=cast("IO[str]", Terminal(sys.stdout)))
    for line in recipe.mesh.in_words(options.mesh) if is_first() else ():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    stop = stop_request(lifeline)
    with stop.listening(), live_page(options.run if shown and is_first() else None):
        outcome = run_training(recipe, options, console=console, stop=stop)
    if is_first():

        def again(num_steps: int) -> list[str]:
            longer = replace(options, num_steps=num_steps)
            return _arguments(recipe.path, longer, flags, short=True)

        print_result(console, options.run, outcome, again)
    if outcome.stopped:
        end_with(INTERRUPTED_EXIT_CODE)


def _arguments(
    recipe: Path, options: "TrainOptions", flags: Sequence[str], *, short: bool = False
) -> list[str]:
    """Return the command line of `options`; if `short`, only what resuming the run needs."""
    resume = options.resume
    values = {
        **_plan_words(options),
        "--steps": options.num_steps,
        "--seed": options.seed,
        "--out": options.run,
        "--init": options.init,
        "--resume": IF_ANY if options.interrupted else resume.path if resume else None,
        "--validate-every": options.validate_every,
        "--checkpoint-every": options.checkpoint_every,
        "--keep": options.keep,
        "--record": options.record,
        "--log": ",".join(options.loggers) or None,
        "--timeout": options.timeout,
        "--replace-lost": options.replace,
    }
    if short:
        values = {
            name: value
            for name, value in values.items()
            if name not in _IN_CHECKPOINT and value != _DEFAULTS.get(name)
        }
    return ["train", str(recipe), *command_line(values), *flags]


def _plan_words(options: "TrainOptions") -> dict[str, object]:
    mesh = {} if options.mesh is None else {"--devices": None, "--mesh": options.mesh}
    if isinstance(options.plan, Plan):
        return {"--plan": options.plan_file, **mesh}
    more = {"--microbatches": AUTO} if options.adaptive else {}
    return {**words_of(options.plan), **mesh, **more}


def _seed(given: int | None, checkpoint: "Checkpoint | None") -> int:
    if checkpoint is None:
        return 0 if given is None else given
    if given is not None and given != checkpoint.seed:
        raise UsageError(
            f"--seed {given} is not the seed of {checkpoint.path}, which is {checkpoint.seed}; "
            "leave --seed out to resume that run"
        )
    return checkpoint.seed
