"""`stagewise export`: write a run's model as safetensors, for other tools."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Source = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|CHECKPOINT",
        help="Directory of a run, whose last undamaged checkpoint is taken, or of a checkpoint.",
    ),
]
Target = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="Where to write: one file if it ends in .safetensors, otherwise a directory, with a "
        "shard for every 2 GiB.",
    ),
]


def export(run: Source, out: Target) -> None:
    """Write the model of a checkpoint as safetensors, under the plain model's names.

    If the model is one of transformers, a directory also gets its configuration, and the recipe's
    `tokenizer`, so that `from_pretrained` reads it. `stagewise train --init OUT` starts from it.

    Example: stagewise export runs/shakespeare shakespeare.safetensors
    """
    from stagewise.checkpoints.exporting import check_free, export_model
    from stagewise.training.run_folder import find_undamaged
    from stagewise.training.state.pretrained import pretrained_files

    check_free(out)
    checkpoint, warnings = find_undamaged(run)
    beside = pretrained_files(checkpoint.run)
    left_out = export_model(checkpoint.path, out, beside)
    if left_out:
        warnings.append(f"safetensors holds only tensors; left out: {', '.join(left_out)}")
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    kind = "with the model's configuration" if beside and out.is_dir() else "as safetensors"
    Console().print(
        f"{out}: the model after step {checkpoint.step}, {kind}", highlight=False, soft_wrap=True
    )
