"""`stagewise plan` with a search: its options, progress bar and output."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stagewise.cli.typed import DEFAULT_MICROBATCHES, Typed
from stagewise.errors import UsageError
from stagewise.mesh import MeshShape
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.request import AUTO, PlanRequest

if TYPE_CHECKING:
    from stagewise.planning import Plan, SearchResult
    from stagewise.planning.meshes.mesh_cost import MeshCost
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
NoTrial = Annotated[
    bool,
    typer.Option(
        "--no-trial",
        help="Keep the plan that is fastest as predicted. By default the few best, of different "
        "kinds, are run for some steps each, and the fastest is kept.",
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="S",
        help="How long a search may measure and try plans. [default: ten steps' worth, at least 2]",
        show_default=False,
    ),
]


MeshText = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXIS=N,...|auto",
        help="With --device: what pipelines side by side on a mesh cost and save, such as "
        "pp=2,dp_shard=4; auto searches over all meshes of --devices.",
        show_default=False,
    ),
]


def run_mesh(
    recipe: "Recipe", typed: Typed, spec: DeviceSpec | None, mesh: str, *, as_json: bool
) -> bool:
    """Print what a mesh costs, or the fastest that fits; return whether it fits."""
    if spec is None:
        raise UsageError(
            f"--mesh {mesh} needs --device, the name of the devices to plan for: one machine's "
            "measurements say nothing of the links between those of a mesh"
        )
    for option, given in (("--stages", typed.stages), ("--replicas", typed.replicas)):
        if given is not None:
            raise UsageError(f"--mesh {mesh} says how long pipelines are; leave {option} out")
    shape = None if mesh == AUTO else MeshShape.of(mesh)
    if shape is None and typed.devices is None:
        raise UsageError("--mesh auto needs --devices, the number of all of them")
    if shape is not None and typed.devices not in (None, shape.num_ranks):
        raise UsageError(
            f"the mesh {shape} needs {shape.num_ranks} devices, but --devices is {typed.devices}"
        )
    number = typed.devices if shape is None else shape.num_devices
    microbatches = typed.microbatches or AUTO
    request = replace(typed, devices=number, microbatches=microbatches).request()
    from stagewise.training.pricing.mesh_plans import priced_mesh

    found = priced_mesh(recipe, request, spec, shape)
    chosen = found.chosen
    if as_json:
        fields = {
            **json.loads(chosen.plan.to_json()),
            "mesh": str(chosen.shape),
            "predicted": _figures(chosen),
            "why": found.why,
            "others": [_figures(other) for other in found.others],
        }
        print(json.dumps(fields, indent=2))
    else:
        console = Console()
        for part in (str(found), "", str(chosen.plan)):
            console.print(part, markup=False, highlight=False, soft_wrap=True)
    return chosen.fits


def _figures(cost: "MeshCost") -> dict[str, object]:
    return {
        "mesh": str(cost.shape),
        "step_seconds": cost.step_seconds,
        "exchange_seconds": cost.exchange_seconds,
        "parts": cost.parts,
        "kept_bytes": cost.kept_bytes,
        "device_bytes": cost.device_bytes,
        "fits": cost.fits,
    }


def run_search(
    recipe: "Recipe",
    request: PlanRequest,
    spec: DeviceSpec | None,
    *,
    as_json: bool,
    html: Path | None,
    seconds: float | None = None,
) -> None:
    """Search on every worker; rank 0 prints."""
    from stagewise.engine.transport.processes import is_first
    from stagewise.training.plans import estimated_search, measured_search

    prints = is_first()
    with progress_bar(prints) as progress:
        if spec is not None:
            result = estimated_search(recipe, request, spec, progress)
        else:
            result = measured_search(recipe, request, progress, seconds=seconds)
    if not prints:
        return
    from stagewise.report.search_table import as_record

    record = {**json.loads(result.plan.to_json()), "search": as_record(result)}
    if html is not None:
        save_page(html, recipe.path, result.plan, record, result)
    show(result, record if as_json else None)


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


def show(result: "SearchResult", record: Mapping[str, object] | None) -> None:
    """Print the result as tables, or its `record` as JSON."""
    from stagewise.report.search_table import explanation

    if record is not None:
        print(json.dumps(record, indent=2))
        return
    console = Console()
    for part in explanation(result):
        console.print(part, markup=False, highlight=False, soft_wrap=True)


def save_page(
    html: Path,
    recipe: Path,
    plan: "Plan",
    record: Mapping[str, object],
    found: "SearchResult | None" = None,
) -> None:
    """Write the page of a plan, and of the search for it; say where it is."""
    from stagewise.page.document import environment_here, write_html
    from stagewise.page.plan_page import plan_page

    if not plan.cells:
        raise UsageError(
            "--html shows predictions, but a model on the meta device cannot be measured; give "
            "--device, so that its costs are estimated"
        )
    title = f"stagewise plan: {recipe.name}"
    environment = environment_here(recipe=str(recipe))
    write_html(plan_page(plan, record, title=title, environment=environment, found=found), html)
    print(f"wrote {html}: open it in a browser", file=sys.stderr)
