"""Options that several commands share, and the checks that need no torch."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stagewise.errors import PlanError, ScheduleError, UsageError
from stagewise.planning import ScheduleChoice, check_balance, choose_schedule
from stagewise.planning.devices import (
    DeviceSpec,
    device_named,
    load_devices,
    own_device_files,
    with_efficiency,
)
from stagewise.schedule import POLICIES, SCHEDULES, Schedule, parse_schedule, with_recompute

DEFAULT_MICROBATCHES, DEFAULT_DEVICES = 8, 2
AUTO = "auto"

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


def parsed_balance(text: str | None, num_stages: int) -> tuple[int, ...] | None:
    """ "4,6" as numbers, one for each stage; raises PlanError if it is anything else."""
    if text is None:
        return None
    try:
        balance = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PlanError(
            f"--balance {text!r} is no list of numbers; write the number of cells on each stage, "
            "such as --balance 4,6"
        ) from None
    check_balance(balance, sum(balance), num_stages)
    return balance


def parsed_microbatches(text: str | None, schedule: str) -> tuple[int | None, bool]:
    """A number and False, or for "auto" None and True; raises PlanError if it is anything else."""
    if text == AUTO:
        if schedule not in SCHEDULES:
            raise PlanError(
                f"--microbatches auto needs a schedule for any number of them, but {schedule} is "
                "a file for one; give a name, or leave --microbatches out"
            )
        return None, True
    if text is not None and not (text.isdecimal() and int(text)):
        raise PlanError(f"--microbatches {text!r} is no number from 1; give one, or auto")
    return (None if text is None else int(text)), False


def parsed_replicas(text: str | None) -> tuple[int, ...]:
    """ "1,2,1" as numbers; raises ScheduleError if it is anything else."""
    if text is None:
        return ()
    words = text.split(",")
    replicas = tuple(int(word) for word in words if word.strip().isdecimal())
    if len(replicas) != len(words) or 0 in replicas:
        raise ScheduleError(
            f"--replicas {text!r} is no list of numbers from 1; write the number of devices of "
            "each stage, such as --replicas 1,2,1"
        )
    return replicas


def schedule_meant(text: str) -> str | Schedule:
    """A schedule's name as it is, or the schedule that the file of that name holds.

    Raises ScheduleError where there is neither, or the file holds no valid schedule.
    """
    if text in SCHEDULES:
        return text
    path = Path(text)
    if path.suffix or path.parent != Path(".") or path.exists():
        try:
            return parse_schedule(text, path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ScheduleError(
                f"the schedule {text} cannot be read ({error}); give one of {_names()}, or write "
                f"a file to start from: stagewise simulate --text > {text}"
            ) from None
    raise ScheduleError(
        f"there is no schedule {text!r}; choose one of {_names()}, or give a file that holds one, "
        f"such as {text}.txt"
    )


def chosen_schedule(
    schedule: str,
    recompute: str,
    *,
    stages: int | None,
    devices: int | None,
    microbatches: int | None,
    replicas: str | None = None,
    default_devices: int = DEFAULT_DEVICES,
) -> ScheduleChoice:
    """The schedule that options ask for; raises PlanError or ScheduleError with a way out."""
    meant = schedule_meant(schedule)
    if isinstance(meant, str):
        if stages is None and devices is None and replicas is None:
            devices = default_devices
        count = DEFAULT_MICROBATCHES if microbatches is None else microbatches
    else:
        count = meant.num_microbatches if microbatches is None else microbatches
    choice = choose_schedule(
        meant,
        count,
        num_stages=stages,
        num_devices=devices,
        replicas=parsed_replicas(replicas),
    )
    with_recompute(choice.built, recompute)
    return choice


def size_arguments(
    schedule: str | Schedule, num_stages: int, num_devices: int, replicas: tuple[int, ...] = ()
) -> dict[str, int | str | None]:
    """The options that give these numbers again; None where the schedule or others say it."""
    if replicas:
        return {"--replicas": ",".join(map(str, replicas))}
    usual = SCHEDULES[schedule].stages_per_device if isinstance(schedule, str) else None
    implied = usual is None or usual * num_devices == num_stages
    return {"--stages": num_stages, "--devices": None if implied else num_devices}


def _names() -> str:
    return ", ".join(sorted(SCHEDULES))


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
