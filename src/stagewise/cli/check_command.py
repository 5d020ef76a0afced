"""`stagewise check`: compare a recipe's model, plain and pipelined, on one of its batches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stagewise.cli import options as opt
from stagewise.cli.typed import named_or_read, numbers_in, parsed_replicas
from stagewise.errors import RecipeError, UsageError
from stagewise.schedule import POLICIES, SCHEDULES, Schedule
from stagewise.training.workers.environment import launched

if TYPE_CHECKING:
    from stagewise.parity import ParityReport
    from stagewise.training.recipe import Recipe

DEFAULT_MICROBATCHES = 4

StagesList = Annotated[
    str | None,
    typer.Option(
        "--stages",
        metavar="N,N,...",
        help="Numbers of stages to try; each schedule runs those that it supports. [default: the "
        "stages of 1,2,4 devices, at most one per cell]",
        show_default=False,
    ),
]
DevicesList = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="N,N,...",
        help="Numbers of devices to try, instead of --stages.",
        show_default=False,
    ),
]
MicrobatchesList = Annotated[
    str | None,
    typer.Option(
        "--microbatches",
        metavar="N,N,...",
        help="Numbers of microbatches to try. [default: 4, or those of the schedule's file]",
        show_default=False,
    ),
]
ScheduleList = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="NAME|FILE,...",
        help=f"Schedules to run: {', '.join(sorted(SCHEDULES))}, or files as printed by `stagewise "
        "simulate --text`. [default: all that do not split the backward]",
        show_default=False,
    ),
]
RecomputeList = Annotated[
    str | None,
    typer.Option(
        "--recompute",
        metavar="POLICY,POLICY,...",
        help=f"Recomputation policies to run: {', '.join(POLICIES)}. [default: all]",
        show_default=False,
    ),
]
Double = Annotated[
    bool,
    typer.Option(
        "--double",
        help="Compute in float64, in which round-off is far smaller than any error.",
    ),
]


def check_command(
    recipe: opt.RecipeArgument,
    stages: StagesList = None,
    devices: DevicesList = None,
    replicas: opt.Replicas = None,
    microbatches: MicrobatchesList = None,
    schedule: ScheduleList = None,
    recompute: RecomputeList = None,
    double: Double = False,
) -> None:
    """Check that the pipelined model trains like the plain one: the same loss and gradients.

    Runs one training step on the recipe's first batch, plain and in every requested pipelined
    configuration, in this process. Prints the differences in loss, outputs, gradients, buffers and
    the parameters after an optimizer step, and which of them mathematics explains (BatchNorm per
    microbatch, dropout's random numbers). The exit code is 1 if any difference is unexplained.

    A model that is not a sequence of cells is captured, as in training, and compared with itself.

    Example: stagewise check examples/shakespeare.py --double
    """
    RecipeError.unless_file(recipe)
    if launched():
        raise UsageError("stagewise check runs in one process; start it without torchrun")
    if stages is not None and devices is not None:
        raise UsageError("--stages and --devices were both given; choose one of them")
    schedules = None if schedule is None else tuple(map(named_or_read, schedule.split(",")))
    asked = {
        "num_stages": _numbers("--stages", stages),
        "num_devices": _numbers("--devices", devices),
        "replicas": parsed_replicas(replicas),
        "num_microbatches": _numbers("--microbatches", microbatches) or _own_counts(schedules),
        "schedules": schedules,
        "recompute": _policies(recompute),
    }
    from stagewise.training.recipe import load_recipe

    loaded = load_recipe(recipe)
    report = _run(loaded, asked, double=double)
    from stagewise.report import render_parity

    console = Console(soft_wrap=True)
    console.print(render_parity(report), highlight=False)
    if left_out := _left_out(loaded):
        console.print(
            f"Checked without the recipe's {', '.join(left_out)}: one step in the precision of the "
            "model and its batch.",
            highlight=False,
        )
    if not report.ok:
        raise SystemExit(1)


def _run(recipe: "Recipe", asked: dict[str, Any], *, double: bool) -> "ParityReport":
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from stagewise.checker.check_parity import check_parity
    from stagewise.training.batches import TrainingBatches
    from stagewise.training.recipe import build_model

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
            max_value=recipe.clip_grad_value,
            **asked,
            dtype=torch.float64 if double else None,
            cells=recipe.cells,
            batch_dim=recipe.batch_dim,
            loss_reduction=recipe.loss_reduction,
        )


def _left_out(recipe: "Recipe") -> list[str]:
    """Return what the recipe asks for and the check leaves out."""
    asked = {
        "autocast": recipe.autocast is not None,
        "grad_scaler": recipe.grad_scaler is not None,
        "accumulate": recipe.accumulate > 1,
        "accumulate_in_float32": recipe.accumulate_in_float32,
        "groups": bool(recipe.groups),
    }
    return [name for name, is_asked in asked.items() if is_asked]


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    return None if text is None else numbers_in(option, text, "it as in", "1,2,4")


def _own_counts(schedules: Sequence[str | Schedule] | None) -> tuple[int, ...]:
    own = {s.num_microbatches for s in schedules or () if isinstance(s, Schedule)}
    return tuple(sorted(own)) or (DEFAULT_MICROBATCHES,)


def _policies(text: str | None) -> tuple[str, ...]:
    """Parse "never,always"; all by default; raise UsageError for unknown names."""
    names = tuple(POLICIES) if text is None else tuple(text.split(","))
    for name in names:
        if name not in POLICIES:
            raise UsageError(
                f"there is no recompute policy {name!r}; choose from {', '.join(POLICIES)}"
            )
    return names
