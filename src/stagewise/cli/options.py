"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stagewise.cli.typed import DEFAULT_MICROBATCHES
from stagewise.errors import UsageError
from stagewise.planning.devices import (
    DeviceSpec,
    device_named,
    load_devices,
    own_device_files,
    with_efficiency,
)
from stagewise.schedule import POLICIES, SCHEDULES

RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A Python file that defines model(), data(split), loss(output, target) and "
        "optimizer(parameters); see examples/shakespeare.py.",
        show_default=False,
    ),
]
Stages = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Into how many stages the model is cut. Some schedules put several on each device. "
        "[default: as many as the devices hold]",
        show_default=False,
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many devices work side by side: each gets a worker process of its own (and a "
        "GPU of its own, where there are any); 1 trains in this process. [default: 2, or as many "
        "as hold the stages]",
        show_default=False,
    ),
]
Microbatches = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Into how many microbatches each minibatch is split. More keep the devices busier "
        "(4 times the devices is plenty), but each must still be worth computing. "
        f"[default: {DEFAULT_MICROBATCHES}, or those of the schedule's file]",
        show_default=False,
    ),
]
AdaptiveMicrobatches = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Into how many microbatches each minibatch is split, or auto: the number is chosen by "
        "measuring, and changed in the run where that is faster or memory runs out. More keep the "
        "devices busier (4 times the devices is plenty), but each must still be worth computing. "
        f"[default: {DEFAULT_MICROBATCHES}, or those of the schedule's file]",
        show_default=False,
    ),
]
ScheduleName = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="In which order devices run stages and microbatches; `stagewise simulate --list` "
        f"explains the names: {', '.join(SCHEDULES)}. Or a file with a schedule of your own, as "
        "`stagewise simulate --text` prints it.",
    ),
]
Recompute = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        help="Whether to drop activations and compute them again when needed, which saves memory "
        f"and costs time: {', '.join(POLICIES)}.",
    ),
]
Balance = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="How many of the model's cells each stage gets, such as 4,6. By default the cells "
        "are measured and the best cut is taken.",
        show_default=False,
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="How many devices each stage gets, such as 1,2,1, in place of --stages and --devices: "
        "those of a stage take its microbatches in turn, so that a stage may have twice the work "
        "on two; one number alone is data parallelism. For "
        f"{', '.join(name for name, row in SCHEDULES.items() if row.takes_replicas)}, or a file. "
        "[default: one each]",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Decides the initial parameters, dropout and, unless the recipe seeds it itself, "
        "the order of the data. [default: 0, or the checkpoint's with --resume]",
        show_default=False,
    ),
]


DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Estimate the costs on this device instead of measuring here, without allocating the "
        "model: h100, a100, mi300x, tpu-v3, cpu, ... or one of your own.",
        show_default=False,
    ),
]


DeviceFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A TOML file with devices of your own, as stagewise's planning/devices.toml; "
        "~/.config/stagewise/devices.toml is read too.",
        show_default=False,
    ),
]


EfficiencyText = Annotated[
    str | None,
    typer.Option(
        "--efficiency",
        metavar="FRACTION",
        help="The fraction of the device's published peak that is reached: 0.4 for arithmetic, or "
        "compute=0.4,memory=0.8,link=0.9.",
        show_default=False,
    ),
]


def chosen_device(name: str | None, file: Path | None, efficiency: str | None) -> DeviceSpec | None:
    """The device that the options describe; None if none is named."""
    if name is None:
        for option, value in (("--device-file", file), ("--efficiency", efficiency)):
            if value is not None:
                raise UsageError(f"{option} needs --device, the name of the device to plan for")
        return None
    own = own_device_files(file, os.environ, Path.home())
    device = device_named(name, load_devices(own))
    return device if efficiency is None else with_efficiency(device, efficiency)
