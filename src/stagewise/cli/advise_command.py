"""`stagewise advise`: decide whether a pipeline is the right tool for a model and its devices."""

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stagewise.cli import options as opt
from stagewise.costs import load_seconds
from stagewise.errors import PlanError, RecipeError, UsageError
from stagewise.planning.devices import parse_bytes
from stagewise.slow_notice import told
from stagewise.training.workers.environment import launched

if TYPE_CHECKING:
    from stagewise.planning.advice.advise import Advice
    from stagewise.planning.advice.advise_facts import Facts
    from stagewise.planning.devices import DeviceSpec
    from stagewise.training.recipe import Recipe

Devices = Annotated[int, typer.Option(min=1, metavar="N", help="How many devices there are.")]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of each device, such as 16GB. [default: the device's, or this machine's]",
        show_default=False,
    ),
]
Microbatches = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of microbatches per minibatch. [default: four times the devices, at most one "
        "per sample]",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def advise_command(
    recipe: opt.RecipeArgument,
    devices: Devices = 2,
    device: opt.DeviceName = None,
    device_memory: DeviceMemory = None,
    device_file: opt.DeviceFile = None,
    efficiency: opt.EfficiencyText = None,
    microbatches: Microbatches = None,
    as_json: AsJson = False,
) -> None:
    """Recommend how to train a recipe's model: data parallelism, a pipeline, replicas, or else.

    Costs are measured here, or, with --device, estimated without allocating the model. Each rule is
    shown with its numbers and advice: does the model, or at least every cell, fit one device; do
    cells have similar costs; are there enough microbatches of enough samples; is communication
    cheap?

    Example: stagewise advise examples/shakespeare.py --devices 8 --device h100
    """
    RecipeError.unless_file(recipe)
    if launched():
        raise UsageError("stagewise advise runs in one process; start it without torchrun")
    spec = opt.chosen_device(device, device_file, efficiency)
    memory = None if device_memory is None else parse_bytes(device_memory, "--device-memory")
    from stagewise.planning.advice.advise import advise
    from stagewise.training.recipe import load_recipe
    from stagewise.training.recipe_costs import facts_of

    doing = "measuring" if spec is None else "estimating"
    with told(f"{doing} the model's cells{'' if spec is None else f' for {spec.name}'}"):
        facts = facts_of(
            load_recipe(recipe),
            spec,
            num_devices=devices,
            device_memory_bytes=memory,
            num_microbatches=microbatches,
        )
        advice = advise(facts)
        if spec is not None and devices > 1:
            advice = _searched(advice, load_recipe(recipe), spec, facts, microbatches)
    where = [] if device is None else ["--device", device]
    more = where if advice.command != "train" else []
    command = shlex.join(["stagewise", advice.command, str(recipe), *advice.options, *more])
    if as_json:
        record = {**asdict(advice), "command": command, "device": device or "measured here"}
        print(json.dumps(record, indent=2))
    else:
        _print(advice, facts, device, command)


def _searched(
    advice: "Advice", recipe: "Recipe", device: "DeviceSpec", facts: "Facts", count: int | None
) -> "Advice":
    """Return the advice with the mesh that `plan --mesh auto` finds, if any fits."""
    from stagewise.planning.advice.advise_mesh import with_mesh
    from stagewise.planning.request import AUTO, PlanRequest
    from stagewise.training.pricing.mesh_plans import priced_mesh

    request = PlanRequest(
        num_devices=facts.num_devices,
        num_microbatches=count or AUTO,
        memory_bytes=facts.device_memory_bytes,
    )
    try:
        found = priced_mesh(recipe, request, device, None)
    except PlanError:
        return advice  # none fits: the rules say what would
    alone = facts.num_microbatches * sum(map(load_seconds, facts.cells))
    return with_mesh(advice, found, alone if facts.fitting[False] == 1 else None)


def _print(advice: "Advice", facts: "Facts", device: str | None, command: str) -> None:
    source = f"estimated for {device}" if device else "measured here"
    console = Console()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    say(f"[bold]{advice.choice}[/]: {escape(advice.reason)}\n")
    table = Table(
        title=f"{facts.num_devices} devices, {facts.num_microbatches} microbatches of "
        f"{facts.microbatch_size} samples; costs {source}",
        title_justify="left",
    )
    for heading in ("", "question", "answer", "what to do"):
        table.add_column(heading)
    for verdict in advice.verdicts:
        mark = "[green]ok[/]" if verdict.ok else "[yellow]![/]"
        table.add_row(mark, verdict.rule, verdict.reason, "" if verdict.ok else verdict.advice)
    console.print(table)
    if advice.besides:
        say(f"to compare: {escape(advice.besides)}")
    say(f"next: {escape(command)}")
