"""`stagewise plan` with a search: its options, progress bar and output."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stagewise.cli.typed import DEFAULT_MICROBATCHES
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.request import PlanRequest

if TYPE_CHECKING:
    from stagewise.planning import SearchResult
    from stagewise.training.recipe import Recipe

Microbatches = Annotated[
    str | None,
    typer.Option(
        metavar="N|N,N,...|auto",
        help="Number of microbatches per minibatch: one number, several to choose from, or auto. "
        "More keep the devices busier, but make each computation smaller. "
        f"[default: {DEFAULT_MICROBATCHES}, or those of the schedule's file]",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of each device, such as 8GB (or 8GB,16GB for two devices), for parameters, "
        "gradients, optimizer state and activations: search for the fastest plan that fits.",
        show_default=False,
    ),
]


def run_search(
    recipe: "Recipe", request: PlanRequest, spec: DeviceSpec | None, *, as_json: bool
) -> None:
    """Search on every worker; rank 0 prints."""
    from stagewise.engine.transport.processes import is_first
    from stagewise.training.plans import estimated_search, measured_search

    prints = is_first()
    with progress_bar(prints) as progress:
        if spec is not None:
            result = estimated_search(recipe, request, spec, progress)
        else:
            result = measured_search(recipe, request, progress)
    if prints:
        show(result, as_json=as_json)


@contextmanager
def progress_bar(visible: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not (visible and console.is_terminal)
    ) as bar:
        task = bar.add_task("searching", total=None)

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield advance


def show(result: "SearchResult", *, as_json: bool) -> None:
    """Print the result as tables, or as the plan's JSON with a field `search`."""
    from stagewise.report.search_table import as_record, explanation

    if as_json:
        plan = json.loads(result.plan.to_json())
        print(json.dumps({**plan, "search": as_record(result)}, indent=2))
        return
    console = Console()
    for part in explanation(result):
        console.print(part, markup=False, highlight=False, soft_wrap=True)
