"""`stagewise report`: where the time and the memory of a run went, and what would help."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stagewise.cli import options as opt
from stagewise.errors import RunError, UsageError
from stagewise.page.document import check_html, write_html
from stagewise.page.run_page import run_page
from stagewise.recording import RunFiles, read_run
from stagewise.report.chrome_trace import chrome_trace
from stagewise.report.run_report import RunReport

_WIDEST = 160


Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...",
        help="The folder of a run (--out of stagewise train), or a recording.json; with --html "
        "several, to compare them.",
        show_default=False,
    ),
]


def report_command(
    runs: Runs,
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
    html: opt.HtmlFile = None,
) -> None:
    """Show where the time and the memory of a run went, and what would help.

    The predicted and the measured step, one above the other; the idle time of every device by its
    causes, which add up; what would save time, in seconds, with the command that does it; memory.
    `stagewise train` records a few steps (--record), as does `pipe.record(folder)`.

    Example: stagewise report runs/shakespeare

    Example: stagewise report runs/first runs/second --html page.html
    """
    found = _read(runs, html)
    if trace is not None:
        _write_trace(trace, found[0])
    if html is not None:
        write_html(run_page(found), html)
        print(f"wrote {html}: open it in a browser", file=sys.stderr)
    reports = [RunReport(run) for run in found]
    if as_json:
        records = [report.record() for report in reports]
        typer.echo(json.dumps(records if len(records) > 1 else records[0], indent=2))
    if as_json or len(reports) > 1:
        return
    console = Console()
    width = min(console.width, _WIDEST)
    for part in reports[0].shown(width):
        is_text = isinstance(part, str)
        console.print(part, markup=False, highlight=False, soft_wrap=is_text)


def _read(runs: list[Path], html: Path | None) -> list[RunFiles]:
    if html is None and len(runs) > 1:
        raise UsageError(
            f"{len(runs)} runs were given, but they are compared on a page only; add --html FILE, "
            "or give one run"
        )
    if html is not None:
        check_html(html)
    return [read_run(run) for run in runs]


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
