"""`stagewise plan`: measure a recipe's model, cut it, and predict a step."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stagewise.cli import options as opt
from stagewise.cli.search import Memory, Microbatches, Wishes, parsed_microbatches, run_search
from stagewise.cli.workers import errors_told_once, run_in_workers
from stagewise.planning.devices import DeviceSpec

if TYPE_CHECKING:
    from stagewise.planning import Plan
    from stagewise.training.plans import PlanOptions, SearchOptions
    from stagewise.training.recipe import Recipe

AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object: the plan, as stagewise.Plan.from_json reads it, with its "
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
    as_json: AsJson = False,
) -> None:
    """Show how the model of a recipe would be cut, and what a step would take, without training.

    Measures every cell of the model on the first batch, in as many workers at once as there are
    devices, so that the machine is as busy as it will be. Prints the cells' costs, the cut with
    the least busy stages, the predicted step time and bubble, and the memory of each device.

    With --device nothing is measured and nothing allocated: the costs are estimated for that
    device, so that a plan for 64 of them can be made on a laptop.

    With --schedule, --microbatches, --recompute or --replicas auto, or with --memory, the fastest
    plan that fits is searched for, and the answer says what was rejected and why.

    Example: stagewise plan examples/shakespeare.py --stages 3

    Example: stagewise plan examples/shakespeare.py --devices 4 --schedule auto --memory 2GB
    """
    with errors_told_once():
        spec = opt.chosen_device(device, device_file, efficiency)
        wishes = Wishes(
            schedule=schedule,
            recompute=recompute,
            replicas=replicas,
            microbatches=microbatches,
            memory=memory,
        )
        if wishes.searched:
            options = wishes.options(devices=devices, stages=stages, balance=balance)
            _search(recipe, wishes, options, spec, as_json=as_json)
            return
        count = parsed_microbatches(microbatches)
        assert not isinstance(count, tuple)
        choice = opt.chosen_schedule(
            schedule,
            recompute,
            stages=stages,
            devices=devices,
            replicas=replicas,
            microbatches=count,
        )
        cut = opt.parsed_balance(balance, choice.num_stages)
        from stagewise.training.plans import PlanOptions
        from stagewise.training.prepare import check_form
        from stagewise.training.recipe import load_recipe

        loaded = load_recipe(recipe)
        cut_options = PlanOptions(
            num_stages=choice.num_stages,
            num_devices=choice.num_devices,
            replicas=choice.replicas,
            num_microbatches=choice.built.num_microbatches,
            schedule=choice.like,
            recompute=recompute,
            balance=cut,
        )
        if spec is not None:
            from stagewise.training.plans import estimated_plan

            _show(estimated_plan(loaded, cut_options, spec), as_json=as_json)
            return
        arguments = [
            *("plan", str(recipe), "--schedule", schedule, "--recompute", recompute),
            *("--stages", str(choice.num_stages), "--devices", str(choice.num_devices)),
            *("--microbatches", str(choice.built.num_microbatches)),
            *(("--balance", balance) if balance else ()),
            *(("--replicas", replicas) if replicas else ()),
            *(("--json",) if as_json else ()),
        ]
        run_in_workers(
            choice.num_devices,
            arguments,
            before=lambda: check_form(loaded, cut_options, None),
            body=lambda: _run(loaded, cut_options, as_json=as_json),
        )


def _search(
    path: Path,
    wishes: Wishes,
    options: "SearchOptions",
    spec: DeviceSpec | None,
    *,
    as_json: bool,
) -> None:
    from stagewise.training.recipe import load_recipe

    recipe = load_recipe(path)
    if spec is not None:
        run_search(recipe, options, spec, as_json=as_json)
        return
    arguments = [
        *("plan", str(path), "--devices", str(options.num_devices), *wishes.arguments()),
        *(("--json",) if as_json else ()),
    ]
    run_in_workers(
        options.num_devices,
        arguments,
        before=lambda: None,
        body=lambda: run_search(recipe, options, None, as_json=as_json),
    )


def _run(recipe: "Recipe", options: "PlanOptions", *, as_json: bool) -> None:
    """What every worker does; rank 0 prints."""
    import torch.distributed as dist

    from stagewise.training.batches import TrainingBatches
    from stagewise.training.plans import make_plan
    from stagewise.training.recipe import build_model

    model = build_model(recipe, seed=0, meta=recipe.meta)
    batch = TrainingBatches(recipe, seed=0).first
    plan = make_plan(recipe, model, options, batch=batch)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    _show(plan, as_json=as_json)


def _show(plan: "Plan", *, as_json: bool) -> None:
    if as_json:
        print(_json(plan))
    else:
        _print(plan)


def _json(plan: "Plan") -> str:
    if not plan.cells:
        return plan.to_json()
    predictions = {
        "step_seconds": plan.timeline.duration_seconds,
        "bubble_fraction": plan.timeline.bubble_fraction,
        "busy_seconds": plan.timeline.busy_seconds,
        "peak_activation_bytes": plan.peak_activation_bytes,
        "parameter_bytes": [cost.parameter_bytes for cost in plan.stage_costs],
    }
    return json.dumps({**json.loads(plan.to_json()), "predicted": predictions}, indent=2)


def _print(plan: "Plan") -> None:
    from stagewise.report.plan import cells_table, devices_table, plan_in_words

    console = Console()
    if plan.cells:
        console.print(cells_table(plan))
        console.print(devices_table(plan))
    console.print(plan_in_words(plan), markup=False, highlight=False, soft_wrap=True)
