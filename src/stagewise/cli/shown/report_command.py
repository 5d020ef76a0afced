"""`stagewise report`: where the time and the memory of a run went, and what would help."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stagewise.recording import read_run
from stagewise.report.run_report import RunReport

_WIDEST = 160


def report_command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="The folder of a run (--out of stagewise train), or a recording.json.",
            show_default=False,
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the report.")
    ] = False,
) -> None:
    """Show where the time and the memory of a run went, and what would help.

    The predicted and the measured step, one above the other; the idle time of every device by its
    causes, which add up; what would save time, in seconds, with the command that does it; memory.
    `stagewise train` records a few steps (--record), as does `pipe.record(folder)`.

    Example: stagewise report runs/shakespeare
    """
    report = RunReport(read_run(run))
    if as_json:
        typer.echo(json.dumps(report.record(), indent=2))
        return
    console = Console()
    width = min(console.width, _WIDEST)
    for part in report.shown(width):
        is_text = isinstance(part, str)
        console.print(part, markup=False, highlight=False, soft_wrap=is_text)
