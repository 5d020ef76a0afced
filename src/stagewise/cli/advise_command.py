"""`stagewise advise`: decide whether a pipeline is the right tool for a model and its devices."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from stagewise.cli import options as opt
from stagewise.errors import UsageError
from stagewise.planning.devices import parse_bytes
from stagewise.training.workers.environment import launched

if TYPE_CHECKING:
    from stagewise.planning.advice.advise import Advice
    from stagewise.planning.advice.advise_facts import Facts

Devices = Annotated[int, typer.Option(min=1, help="How many devices there are.")]
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
    if launched():
        raise UsageError("stagewise advise runs in one process; start it without torchrun")
    spec = opt.chosen_device(device, device_file, efficiency)
    memory = None if device_memory is None else parse_bytes(device_memory, "--device-memory")
    from stagewise.planning.advice.advise import advise
    from stagewise.training.recipe import load_recipe
    from stagewise.training.recipe_costs import facts_of

    facts = facts_of(
        load_recipe(recipe),
        spec,
        num_devices=devices,
        device_memory_bytes=memory,
        num_microbatches=microbatches,
    )
    advice = advise(facts)
    if as_json:
        print(json.dumps({**asdict(advice), "device": device or "measured here"}, indent=2))
    else:
        _print(advice, facts, device)


def _print(advice: "Advice", facts: "Facts", device: str | None) -> None:
    source = f"estimated for {device}" if device else "measured here"
    table = Table(
        title=f"{facts.num_devices} devices, {facts.num_microbatches} microbatches of "
        f"{facts.microbatch_size} samples; costs {source}",
        title_justify="left",
    )
    for heading in ("", "rule", "reason", "what to do"):
        table.add_column(heading)
    for verdict in advice.verdicts:
        mark = "[green]yes[/]" if verdict.ok else "[yellow]no[/]"
        table.add_row(mark, verdict.rule, verdict.reason, "" if verdict.ok else verdict.advice)
    console = Console()
    console.print(table)
    console.print(f"[bold]{advice.choice}[/]: {advice.reason}", soft_wrap=True, highlight=False)
