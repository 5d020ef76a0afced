"""`stagewise report`: where the time and the memory of a run went, and what would help."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stagewise.errors import RunError
from stagewise.recording import RunFiles, read_run
from stagewise.report.chrome_trace import chrome_trace
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
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the recorded steps as a Chrome trace, for ui.perfetto.dev.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show where the time and the memory of a run went, and what would help.

    The predicted and the measured step, one above the other; the idle time of every device by its
    causes, which add up; what would save time, in seconds, with the command that does it; memory.
    `stagewise train` records a few steps (--record), as does `pipe.record(folder)`.

    Example: stagewise report runs/shakespeare
    """
    files = read_run(run)
    report = RunReport(files)
    if trace is not None:
        _write_trace(trace, files)
    if as_json:
        typer.echo(json.dumps(report.record(), indent=2))
        return
    console = Console()
    width = min(console.width, _WIDEST)
    for part in report.shown(width):
        is_text = isinstance(part, str)
        console.print(part, markup=False, highlight=False, soft_wrap=is_text)


def _write_trace(path: Path, run: RunFiles) -> None:
    if run.recording is None:
        raise RunError(
            f"{run.path} has no recorded steps to trace; train with --record N, or use "
            "pipe.record()"
        )
    try:
        path.write_text(chrome_trace(run.recording), encoding="utf-8")
    except OSError as error:
        raise RunError(f"the trace {path} cannot be written: {error.strerror}") from error
