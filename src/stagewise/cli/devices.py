"""Options that name a device which is not here, and what they mean; no torch."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stagewise.errors import UsageError
from stagewise.planning.devices import (
    DeviceSpec,
    device_named,
    load_devices,
    own_device_files,
    with_efficiency,
)

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
