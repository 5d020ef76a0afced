"""`stagewise plan`: measure a recipe's model, cut it, and predict a step."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stagewise.cli import options as opt
from stagewise.cli.plan_search import (
    MeshText,
    Microbatches,
    NoTrial,
    Seconds,
    run_mesh,
    run_search,
    save_page,
)
from stagewise.cli.typed import NumDevices, Typed, check_unnamed, command_line, words_of
from stagewise.cli.workers import end_with, report_errors_once, run_in_workers
from stagewise.errors import RecipeError
from stagewise.planning.choice import requested_schedule
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.request import PlanRequest
from stagewise.training.workers.environment import FAILURE_EXIT_CODE

if TYPE_CHECKING:
    from stagewise.training.plans import Foreseen
    from stagewise.training.recipe import Recipe

AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object: the plan, which stagewise.Plan.from_json reads, with its "
        "predictions under `predicted` (seconds, fractions, bytes).",
    ),
]


def plan_command(
    recipe: opt.RecipeArgument,
    stages: opt.Stages = None,
    devices: opt.Devices = None,
    replicas: opt.Replicas = None,
    microbatches: Microbatches = None,
    schedule: opt.ScheduleName = "1f1b",
    recompute: opt.Recompute = "never",
    balance: opt.Balance = None,
    mesh: MeshText = None,
    memory: opt.Memory = None,
    speeds: opt.Speeds = None,
    device: opt.DeviceName = None,
    device_file: opt.DeviceFile = None,
    efficiency: opt.EfficiencyText = None,
    no_trial: NoTrial = False,
    seconds: Seconds = None,
    as_json: AsJson = False,
    html: opt.HtmlFile = None,
) -> None:
    """Show how a recipe's model would be cut, and how long a step would take, without training.

    Measures every cell of the model on the first batch, with one worker per device at the same
    time, so that the machine is as busy as in training. Prints the cells' costs, the best-balanced
    cut, the predicted step time and bubble, and the memory of each device.

    With --device nothing is measured or allocated: the costs are estimated for that device, so a
    plan for 64 of them can be made on a laptop.

    What one device and data parallelism would take is said beside it. The exit code is 1 if the
    plan does not fit the devices' memory.

    If --schedule, --microbatches, --recompute or --replicas is auto, or with --memory, the fastest
    plan that fits is searched for; the output says what was rejected and why. The best plans of
    different kinds are then tried for a few steps, and the fastest of them is kept: the output says
    what was predicted and what was measured, and the JSON names the machine.

    Example: stagewise plan examples/shakespeare.py --stages 3

    Example: stagewise plan examples/shakespeare.py --devices 4 --schedule auto --memory 2GB

    Example: stagewise plan examples/shakespeare.py --device h100 --devices 16 --mesh auto

    Example: stagewise plan examples/shakespeare.py --stages 3 --html plan.html
    """
    with report_errors_once():
        RecipeError.unless_file(recipe)
        if html is not None:
            from stagewise.page.document import check_html

            check_html(html)
        spec = opt.chosen_device(device, device_file, efficiency)
        if spec is not None or mesh is not None:
            check_unnamed(devices, "what is planned is for others, or for a mesh")
        typed = Typed(
            schedule=schedule,
            recompute=recompute,
            stages=stages,
            devices=devices,
            replicas=replicas,
            microbatches=microbatches,
            balance=balance,
            memory=memory,
            speeds=speeds,
            trial=False if no_trial else None,
        )
        from stagewise.training.recipe import load_recipe

        if mesh is not None:
            if not run_mesh(load_recipe(recipe), typed, spec, mesh, as_json=as_json):
                end_with(FAILURE_EXIT_CODE)
            return
        request = typed.request()
        num_devices = (
            request.num_devices if request.searched else requested_schedule(request).num_devices
        )
        assert num_devices is not None
        from stagewise.training.prepare import check_form

        loaded = load_recipe(recipe)
        if spec is not None:
            _run(loaded, request, spec, as_json=as_json, html=html)
            return
        too = [*["--json"] * as_json, *["--no-trial"] * no_trial]
        too += command_line({"--html": html, "--seconds": seconds})
        run_in_workers(
            NumDevices.of(num_devices, request.device_names),
            ["plan", str(recipe), *command_line(words_of(request)), *too],
            before=lambda: None if request.searched else check_form(loaded, request),
            body=lambda: _run(loaded, request, None, as_json=as_json, html=html, seconds=seconds),
        )


def _run(
    recipe: "Recipe",
    request: PlanRequest,
    spec: DeviceSpec | None,
    *,
    as_json: bool,
    html: Path | None,
    seconds: float | None = None,
) -> None:
    """Plan on every worker; rank 0 prints."""
    from stagewise.engine.transport.processes import is_first
    from stagewise.training.plans import foreseen_plan

    if request.searched:
        run_search(recipe, request, spec, as_json=as_json, html=html, seconds=seconds)
        return
    found = foreseen_plan(recipe, request, spec)
    if is_first():
        record = _record(found)
        if html is not None:
            save_page(html, recipe.path, found.plan, record)
        if as_json:
            print(json.dumps(record, indent=2))
        else:
            _print(found)
    if found.outlook is not None and not found.outlook.fits:
        end_with(FAILURE_EXIT_CODE)


def _record(found: "Foreseen") -> dict[str, object]:
    """Return the plan's fields and its predictions, as JSON-ready values."""
    plan = found.plan
    fields: dict[str, object] = json.loads(plan.to_json())
    if found.outlook is None:
        return fields
    predictions = {
        "step_seconds": plan.timeline.duration_seconds,
        "bubble_fraction": plan.timeline.bubble_fraction,
        "busy_seconds": plan.timeline.busy_seconds,
        "peak_activation_bytes": plan.peak_activation_bytes,
        "parameter_bytes": [cost.parameter_bytes for cost in plan.stage_costs],
        "device_bytes": found.outlook.device_bytes,
        "memory_bytes": found.outlook.room.memory_bytes,
        "fits": found.outlook.fits,
        "alternatives": [asdict(each) for each in found.outlook.alternatives],
    }
    return {**fields, "predicted": predictions}


def _print(found: "Foreseen") -> None:
    from stagewise.report.outlook_words import outlook_in_words
    from stagewise.report.plan_table import cells_table, devices_table

    console, plan = Console(), found.plan
    if plan.cells:
        console.print(cells_table(plan))
        console.print(devices_table(plan))
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
    if found.outlook is not None:
        console.print(found.pace, markup=False, highlight=False, soft_wrap=True)
        for line in outlook_in_words(found.outlook, plan):
            console.print(line, soft_wrap=True, highlight=False)
