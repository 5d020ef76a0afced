"""`stagewise plan`: measure a recipe's model, cut it, and predict a step."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stagewise.cli import options as opt
from stagewise.cli.plan_search import (
    Memory,
    Microbatches,
    NoTrial,
    Seconds,
    run_search,
    save_page,
)
from stagewise.cli.typed import Typed, command_line, words_of
from stagewise.cli.workers import report_errors_once, run_in_workers
from stagewise.planning.choice import requested_schedule
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.request import PlanRequest

if TYPE_CHECKING:
    from stagewise.planning import Plan
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
    memory: Memory = None,
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

    If --schedule, --microbatches, --recompute or --replicas is auto, or with --memory, the fastest
    plan that fits is searched for; the output says what was rejected and why. The best plans of
    different kinds are then tried for a few steps, and the fastest of them is kept: the output says
    what was predicted and what was measured, and the JSON names the machine.

    Example: stagewise plan examples/shakespeare.py --stages 3

    Example: stagewise plan examples/shakespeare.py --devices 4 --schedule auto --memory 2GB

    Example: stagewise plan examples/shakespeare.py --stages 3 --html plan.html
    """
    with report_errors_once():
        if html is not None:
            from stagewise.page.document import check_html

            check_html(html)
        spec = opt.chosen_device(device, device_file, efficiency)
        request = Typed(
            schedule=schedule,
            recompute=recompute,
            stages=stages,
            devices=devices,
            replicas=replicas,
            microbatches=microbatches,
            balance=balance,
            memory=memory,
            trial=False if no_trial else None,
        ).request()
        num_devices = (
            request.num_devices if request.searched else requested_schedule(request).num_devices
        )
        assert num_devices is not None
        from stagewise.training.prepare import check_form
        from stagewise.training.recipe import load_recipe

        loaded = load_recipe(recipe)
        if spec is not None:
            _run(loaded, request, spec, as_json=as_json, html=html)
            return
        too = [*["--json"] * as_json, *["--no-trial"] * no_trial]
        too += command_line({"--html": html, "--seconds": seconds})
        run_in_workers(
            num_devices,
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
    from stagewise.training.batches import TrainingBatches
    from stagewise.training.plans import estimated_plan, make_plan
    from stagewise.training.recipe import build_model

    if request.searched:
        run_search(recipe, request, spec, as_json=as_json, html=html, seconds=seconds)
        return
    if spec is not None:
        plan = estimated_plan(recipe, request, spec)
    else:
        model = build_model(recipe, seed=0, meta=recipe.meta)
        batch = TrainingBatches(recipe, seed=0).first
        plan = make_plan(recipe, model, request, batch=batch)
    if not is_first():
        return
    record = _record(plan)
    if html is not None:
        save_page(html, recipe.path, plan, record)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        _print(plan)


def _record(plan: "Plan") -> dict[str, object]:
    """Return the plan's fields and its predictions, as JSON-ready values."""
    fields = json.loads(plan.to_json())
    if not plan.cells:
        return fields  # type: ignore[no-any-return]
    predictions = {
        "step_seconds": plan.timeline.duration_seconds,
        "bubble_fraction": plan.timeline.bubble_fraction,
        "busy_seconds": plan.timeline.busy_seconds,
        "peak_activation_bytes": plan.peak_activation_bytes,
        "parameter_bytes": [cost.parameter_bytes for cost in plan.stage_costs],
    }
    return {**fields, "predicted": predictions}


def _print(plan: "Plan") -> None:
    from stagewise.report.plan_table import cells_table, devices_table

    console = Console()
    if plan.cells:
        console.print(cells_table(plan))
        console.print(devices_table(plan))
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
