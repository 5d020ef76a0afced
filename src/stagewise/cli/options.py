"""Options that `train` and `plan` share, and the checks that need no torch."""

from pathlib import Path
from typing import Annotated

import typer

from stagewise.errors import PlanError
from stagewise.planning import check_balance
from stagewise.schedule import POLICIES, SCHEDULES, named_schedule, with_recompute

RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A Python file that defines model(), data(split), loss(output, target) and "
        "optimizer(parameters); see examples/shakespeare.py.",
        show_default=False,
    ),
]
Stages = Annotated[
    int,
    typer.Option(
        min=1,
        help="Into how many stages the model is cut. Each stage gets a worker process of its own "
        "(and a GPU of its own, where there are any); 1 trains in this process.",
    ),
]
Microbatches = Annotated[
    int,
    typer.Option(
        min=1,
        help="Into how many microbatches each minibatch is split. More keep the stages busier "
        "(4 times the stages is plenty), but each must still be worth computing.",
    ),
]
ScheduleName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"In which order a stage runs its microbatches: {' or '.join(sorted(SCHEDULES))}. "
        "1f1b keeps fewer activations in memory.",
    ),
]
Recompute = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        help="Whether to drop activations and compute them again when needed, which saves memory "
        f"and costs time: {', '.join(POLICIES)}.",
    ),
]
Balance = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="How many of the model's cells each stage gets, such as 4,6. By default the cells "
        "are measured and the best cut is taken.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Decides the initial parameters, dropout and, unless the recipe seeds it itself, "
        "the order of the data. [default: 0, or the checkpoint's with --resume]",
        show_default=False,
    ),
]


def parsed_balance(text: str | None, num_stages: int) -> tuple[int, ...] | None:
    """ "4,6" as numbers, one for each stage; raises PlanError if it is anything else."""
    if text is None:
        return None
    try:
        balance = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PlanError(
            f"--balance {text!r} is no list of numbers; write the number of cells on each stage, "
            "such as --balance 4,6"
        ) from None
    check_balance(balance, sum(balance), num_stages)
    return balance


def check_schedule(schedule: str, recompute: str, num_stages: int, num_microbatches: int) -> None:
    """Raise ScheduleError unless there are such a schedule and policy."""
    with_recompute(named_schedule(schedule, num_stages, num_microbatches), recompute)
