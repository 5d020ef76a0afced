"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stagewise.cli.typed import DEFAULT_MICROBATCHES, num_devices
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
        metavar="N",
        help="Number of stages. Some schedules put several on each device. [default: as many as "
        "the devices hold]",
        show_default=False,
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(
        parser=num_devices,
        metavar="N|NAME,NAME,...",
        help="Number of devices, each with its own worker process (and its own GPU, if there are "
        "any), or their names, such as cuda:0,cuda:1; one process drives devices of several kinds, "
        "as cuda:0,cpu. 1 trains in this process. [default: 2, or as many as hold the stages]",
        show_default=False,
    ),
]
Speeds = Annotated[
    str | None,
    typer.Option(
        metavar="V,V,...|measured",
        help="How fast each device is, such as 1,0.5 if the second takes twice as long, or "
        "measured: the same cells are timed on each. The cut follows. [default: equal, if they are "
        "of one kind]",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE,SIZE,...",
        help="Memory of each device, such as 8GB (or 8GB,16GB for two devices), for parameters, "
        "gradients, optimizer state and activations: search for the fastest plan that fits.",
        show_default=False,
    ),
]
HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Also write a page with the timeline, memory and other schedules beside it: one file, "
        "to open in a browser. Needs plotly: pip install 'stagewise[page]'.",
        show_default=False,
    ),
]
Microbatches = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of microbatches per minibatch. More keep the devices busier (4 times the "
        "devices is plenty), but make each computation smaller. "
        f"[default: {DEFAULT_MICROBATCHES}, or those of the schedule's file]",
        show_default=False,
    ),
]
AdaptiveMicrobatches = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Number of microbatches per minibatch, such as 8, or auto: chosen by measuring, and "
        "changed during the run if that is faster or memory runs out. More keep the devices busier "
        "(4 times the devices is plenty), but make each computation smaller. "
        f"[default: {DEFAULT_MICROBATCHES}, or those of the schedule's file]",
        show_default=False,
    ),
]
ScheduleName = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="The order in which devices run stages and microbatches; `stagewise simulate --list` "
        f"explains the names: {', '.join(SCHEDULES)}. Or a file with a custom schedule, as printed "
        "by `stagewise simulate --text`.",
    ),
]
Recompute = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        help="Which microbatches drop their activations and recompute them for the backward, which "
        f"saves memory and costs time: {', '.join(POLICIES)}.",
    ),
]
Balance = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="Number of cells per stage, such as 4,6. By default the cells are measured and the "
        "best cut is chosen.",
        show_default=False,
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="Number of devices per stage, such as 1,2,1, instead of --stages and --devices. The "
        "devices of a stage take its microbatches in turn, so a stage on two devices can have "
        "twice the work; a single number means data parallelism. For "
        f"{', '.join(name for name, row in SCHEDULES.items() if row.takes_replicas)}, or a file. "
        "[default: one each]",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Seed of the initial parameters, dropout and, unless the recipe seeds it itself, "
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
        "model: h100, a100, mi300x, tpu-v3, cpu, ... or one from --device-file.",
        show_default=False,
    ),
]


DeviceFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A TOML file with your own devices, in the format of stagewise's "
        "planning/devices.toml; ~/.config/stagewise/devices.toml is read too.",
        show_default=False,
    ),
]


EfficiencyText = Annotated[
    str | None,
    typer.Option(
        "--efficiency",
        metavar="FRACTION",
        help="The achieved fraction of the device's published peak: 0.4 for arithmetic, or "
        "compute=0.4,memory=0.8,link=0.9.",
        show_default=False,
    ),
]


def chosen_device(name: str | None, file: Path | None, efficiency: str | None) -> DeviceSpec | None:
    """Return the device that the options describe; None if none is named."""
    if name is None:
        for option, value in (("--device-file", file), ("--efficiency", efficiency)):
            if value is not None:
                raise UsageError(f"{option} needs --device, the name of the device to plan for")
        return None
    own = own_device_files(file, os.environ, Path.home())
    device = device_named(name, load_devices(own))
    return device if efficiency is None else with_efficiency(device, efficiency)


DEFAULT_TIMEOUT = 600  # torch's for NCCL
Timeout = Annotated[
    int,
    typer.Option(
        min=2,
        metavar="SECONDS",
        help="End the run if a worker waits for another for this long. After a minute, or half of "
        "this, it is printed what each worker does.",
    ),
]
