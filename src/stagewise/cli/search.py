"""`stagewise plan` where something is "auto": options, progress, and the answer in one screen."""

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
        help="Into how many microbatches each minibatch is split: a number, several to choose "
        "from, or auto. More keep the devices busier, but each must still be worth computing. "
        f"[default: {DEFAULT_MICROBATCHES}, or those of the schedule's file]",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What each device has, such as 8GB: the fastest plan that fits is searched for. "
        "Counted are parameters, gradients, the optimizer's state and activations.",
        show_default=False,
    ),
]


def run_search(
    recipe: "Recipe", request: PlanRequest, spec: DeviceSpec | None, *, as_json: bool
) -> None:
    """What every worker does; rank 0 prints."""
    from stagewise.engine.transport.processes import is_first
    from stagewise.training.plans import estimated_search, measured_search

    speaks = is_first()
    with progress_bar(speaks) as progress:
        if spec is not None:
            result = estimated_search(recipe, request, spec, progress)
        else:
            result = measured_search(recipe, request, progress)
    if speaks:
        show(result, as_json=as_json)


@contextmanager
def progress_bar(visible: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, where that is a terminal."""
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
    """Print what was found, as a screen or as JSON that is the plan too."""
    from stagewise.report.search import as_record, explanation

    if as_json:
        plan = json.loads(result.plan.to_json())
        print(json.dumps({**plan, "search": as_record(result)}, indent=2))
        return
    console = Console()
    for part in explanation(result):
        console.print(part, markup=False, highlight=False, soft_wrap=True)
