"""`stagewise check`: a recipe's model plain and pipelined, compared on one of its batches."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stagewise.cli import options as opt
from stagewise.errors import UsageError
from stagewise.schedule import POLICIES, SCHEDULES
from stagewise.training.environment import launched

if TYPE_CHECKING:
    from stagewise.parity import ParityReport
    from stagewise.training.recipe import Recipe

StagesList = Annotated[
    str | None,
    typer.Option(
        "--stages",
        metavar="N,N,...",
        help="Into how many stages the model is cut, one number after another. "
        "[default: 1,2,4, as far as the model has cells]",
        show_default=False,
    ),
]
MicrobatchesList = Annotated[
    str,
    typer.Option(
        "--microbatches",
        metavar="N,N,...",
        help="Into how many microbatches the batch is split.",
    ),
]
ScheduleList = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="NAME,NAME,...",
        help=f"Which schedules to run, of {', '.join(sorted(SCHEDULES))}. [default: all]",
        show_default=False,
    ),
]
RecomputeList = Annotated[
    str | None,
    typer.Option(
        "--recompute",
        metavar="POLICY,POLICY,...",
        help=f"Which policies to run, of {', '.join(POLICIES)}. [default: all]",
        show_default=False,
    ),
]
Double = Annotated[
    bool,
    typer.Option(
        "--double",
        help="Compute in float64, where round-off is far smaller than any mistake.",
    ),
]


def check_command(
    recipe: opt.RecipeArgument,
    stages: StagesList = None,
    microbatches: MicrobatchesList = "4",
    schedule: ScheduleList = None,
    recompute: RecomputeList = None,
    double: Double = False,
) -> None:
    """Show that the pipelined model trains like the plain one: the same loss and gradients.

    Runs one training step of the recipe's first batch plain, and pipelined in every way asked
    for, in this process. Prints how far loss, outputs, gradients, buffers and the parameters
    after an optimizer step are apart, and which differences mathematics explains (BatchNorm by
    microbatch, dropout's random numbers). The exit code is 1 if any is left unexplained.

    Example: stagewise check examples/shakespeare.py --double
    """
    if launched():
        raise UsageError("stagewise check runs in one process; start it without torchrun")
    numbers = None if stages is None else _numbers("--stages", stages)
    counts = _numbers("--microbatches", microbatches)
    schedules = _names("--schedule", schedule, SCHEDULES)
    policies = _names("--recompute", recompute, POLICIES)
    from stagewise.training.recipe import load_recipe

    report = _run(load_recipe(recipe), numbers, counts, schedules, policies, double=double)
    from stagewise.report import render_parity

    Console(soft_wrap=True).print(render_parity(report), highlight=False)
    if not report.ok:
        raise SystemExit(1)


def _run(
    recipe: "Recipe",
    stages: tuple[int, ...] | None,
    microbatches: tuple[int, ...],
    schedules: tuple[str, ...],
    policies: tuple[str, ...],
    *,
    double: bool,
) -> "ParityReport":
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from stagewise.pipeline.checker.parity import check_parity
    from stagewise.training.batches import TrainingBatches
    from stagewise.training.prepare import build_model

    def optimizer(parameters: list[nn.Parameter]) -> Optimizer:
        made = recipe.make_optimizer(parameters)
        assert made is not None  # never asked for without parameters
        return made

    model = build_model(recipe, seed=0)
    inputs, target = TrainingBatches(recipe, seed=0).first
    with recipe.blame("a training step"):
        return check_parity(
            model,
            inputs,
            target=target,
            loss=recipe.loss,
            weight=recipe.weight,
            optimizer=optimizer,
            max_norm=recipe.clip_grad_norm,
            num_stages=stages,
            num_microbatches=microbatches,
            schedules=schedules,
            recompute=policies,
            dtype=torch.float64 if double else None,
        )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,2,4" as numbers; raises UsageError naming the option."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UsageError(
            f"{option} {text!r} is no list of numbers from 1; write it as in {option} 1,2,4"
        )
    return numbers


def _names(option: str, text: str | None, known: Mapping[str, object]) -> tuple[str, ...]:
    """ "gpipe,1f1b" as names, all of `known` by default; raises UsageError naming the option."""
    names = tuple(known) if text is None else tuple(text.split(","))
    for name in names:
        if name not in known:
            raise UsageError(f"{option} has no {name!r}; choose from {', '.join(sorted(known))}")
    return names
