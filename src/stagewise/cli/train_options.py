"""The options of `stagewise train` alone, with their help."""

from pathlib import Path
from typing import Annotated

import typer

Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Total number of steps (minibatches), including those before --resume. [default: one "
        "pass over the recipe's data]",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory for log and checkpoints. [default: runs/RECIPE, with a number appended if "
        "that exists]",
        show_default=False,
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Resume from a run's last checkpoint (give the run's directory) or from a certain "
        "checkpoint (its directory). The number of stages may change.",
        show_default=False,
    ),
]
Init = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Start from these values: a .safetensors file, a directory with model.safetensors or "
        "its shards and index (as Hugging Face's are), or a run or checkpoint of stagewise, "
        "without its optimizer.",
        show_default=False,
    ),
]
SavedPlan = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Use a plan written by `stagewise plan --json`, instead of measuring and of the "
        "options above.",
        show_default=False,
    ),
]
ValidateEvery = Annotated[
    int, typer.Option(min=0, metavar="STEPS", help="Steps between validations; 0 for none.")
]
Keep = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="How many of the last checkpoints to keep. The one with the lowest validation loss is "
        "kept as well.",
    ),
]
Restarts = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="How often to start the workers again, from the newest checkpoint, when one fails. "
        "Under torchrun give its --max-restarts.",
    ),
]
CheckpointEvery = Annotated[
    int, typer.Option(min=0, metavar="STEPS", help="Steps between checkpoints; 0 for none.")
]
