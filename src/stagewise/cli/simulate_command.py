"""`stagewise simulate`: draw a schedule and its costs as a timeline, without torch."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stagewise.cli import options as opt
from stagewise.cli.typed import Typed
from stagewise.costs import LinkCost, StageCost
from stagewise.errors import UsageError
from stagewise.planning.choice import ScheduleChoice, requested_schedule
from stagewise.planning.simulate import simulate
from stagewise.report import format_seconds, render_timeline
from stagewise.schedule import (
    SCHEDULES,
    EqualStages,
    Schedule,
    grid,
    validate,
    with_recompute,
)
from stagewise.timeline import Timeline

DEFAULT_DEVICES = 4

PerDevice = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Stages per device, for schedules that allow any number. [default: 2]",
        show_default=False,
    ),
]


def simulate_command(
    schedule: opt.ScheduleName = "1f1b",
    stages: opt.Stages = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Number of devices. [default: {DEFAULT_DEVICES}, or as many as hold the stages]",
            show_default=False,
        ),
    ] = None,
    stages_per_device: PerDevice = None,
    replicas: opt.Replicas = None,
    microbatches: opt.Microbatches = None,
    recompute: opt.Recompute = "never",
    forward: Annotated[
        str,
        typer.Option(
            metavar="S,S,...",
            help="Seconds of one microbatch's forward: one number for all stages, or one per "
            "stage, separated by commas.",
        ),
    ] = "1",
    backward: Annotated[
        str, typer.Option(metavar="S,S,...", help="The same for the backward.")
    ] = "2",
    weight: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,...",
            help="The same for the weight-gradient part of the backward, for schedules that split "
            "it. [default: half]",
            show_default=False,
        ),
    ] = None,
    latency: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Seconds that a message between two devices takes."),
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the drawing.")
    ] = False,
    as_text: Annotated[
        bool,
        typer.Option(
            "--text",
            help="Print the schedule itself: a line per device, a column per time slot, a dot for "
            "an idle slot. Edit it in a file, and pass that as --schedule.",
        ),
    ] = False,
    html: opt.HtmlFile = None,
    as_list: Annotated[
        bool, typer.Option("--list", help="Explain the available schedules, and exit.")
    ] = False,
) -> None:
    """Draw how a pipeline spends one training step, from costs alone, without model or device.

    Each row is a device and time runs to the right: `F3` is the forward of microbatch 3, `B3` its
    backward (`I3` and `W3` its halves, for inputs and for weights), `R3` its recomputation; if a
    device has several stages, the stage comes first. Dots are idle time, the *bubble*. Try more
    microbatches to shrink it, or unequal stages to see which devices wait:

        stagewise simulate --devices 4 --microbatches 8

        stagewise simulate --schedule gpipe --stages 3 --forward 1,2,1 --backward 2,4,2

        stagewise simulate --schedule zb_v --devices 4 --text > mine.txt

        stagewise simulate --replicas 1,2,1 --forward 1,2,1 --backward 2,4,2
    """
    if as_list:
        typer.echo(_schedules_in_words())
        return
    if as_json and as_text:
        raise UsageError("--json and --text were both given; choose one of them")
    if html is not None:
        from stagewise.page.document import check_html

        check_html(html)
    stages, devices = _numbers(schedule, stages, devices, stages_per_device)
    request = Typed(
        schedule=schedule,
        recompute=recompute,
        stages=stages,
        devices=devices,
        replicas=replicas,
        microbatches=None if microbatches is None else str(microbatches),
    ).fixed(default_devices=DEFAULT_DEVICES)
    choice = requested_schedule(request)
    built = validate(with_recompute(choice.built, recompute))
    costs = _stage_costs(forward, backward, weight, built.num_stages)
    link = LinkCost(latency_seconds=_checked("--latency", latency))
    timeline = simulate(built, costs, link)
    record = _as_json(built, recompute, timeline)
    if html is not None:
        _save_page(html, record, timeline)
    if as_json:
        typer.echo(json.dumps(record))
    elif as_text:
        typer.echo(_as_text(built, recompute))
    else:
        console = Console()
        console.print(render_timeline(timeline, width=console.width))
        if len(set(costs)) == 1 and not (choice.programs or choice.replicas):
            console.print(_closed_form(choice, costs[0]), highlight=False, soft_wrap=True)


def _numbers(
    schedule: str, stages: int | None, devices: int | None, each: int | None
) -> tuple[int | None, int | None]:
    """Return the numbers of stages and devices, given the stages per device `each`."""
    if each is None:
        return stages, devices
    if schedule not in SCHEDULES:
        raise UsageError("--stages-per-device is for named schedules; a file fixes its own number")
    if devices is None:
        devices = DEFAULT_DEVICES if stages is None else max(1, stages // each)
    if stages is not None and stages != devices * each:
        raise UsageError(
            f"--stages {stages} is not --stages-per-device {each} times {devices} devices; correct "
            "one of them, or leave it out"
        )
    return devices * each, devices


def _stage_costs(
    forward: str, backward: str, weight: str | None, num_stages: int
) -> list[StageCost]:
    forwards = _seconds("--forward", forward, num_stages)
    backwards = _seconds("--backward", backward, num_stages)
    if not any(forwards + backwards):
        raise UsageError("--forward and --backward are all 0; give at least one stage some seconds")
    halves = [seconds / 2 for seconds in backwards]
    weights = halves if weight is None else _seconds("--weight", weight, num_stages)
    for w, b in zip(weights, backwards, strict=True):
        if w > b:
            raise UsageError(
                f"--weight is {w:g} seconds, but the backward that it is part of is only {b:g}"
            )
    return [
        StageCost(
            forward_seconds=f,
            backward_seconds=b,
            recompute_seconds=f,
            input_seconds=b - w,
            weight_seconds=w,
        )
        for f, b, w in zip(forwards, backwards, weights, strict=True)
    ]


def _seconds(option: str, text: str, num_stages: int) -> list[float]:
    """Parse a comma-separated list of one cost per stage; raise UsageError naming the option."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{option} is {text!r}; give seconds, such as {option} 1 for all stages, or "
            f"{option} {','.join(['1'] * num_stages)} for one number per stage"
        ) from None
    if len(values) not in (1, num_stages):
        raise UsageError(
            f"{option} {text} gives {len(values)} costs for {num_stages} stages; give one cost "
            "for all stages, or one per stage"
        )
    checked = [_checked(option, value) for value in values]
    return checked if len(checked) == num_stages else checked * num_stages


def _checked(option: str, seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UsageError(f"{option} has {seconds:g}; seconds must be finite and not negative")
    return seconds


def _as_json(schedule: Schedule, recompute: str, timeline: Timeline) -> dict[str, object]:
    return {
        "schedule": schedule.name,
        "num_stages": schedule.num_stages,
        "num_devices": schedule.num_devices,
        "num_microbatches": schedule.num_microbatches,
        "recompute": recompute,
        "step_seconds": timeline.duration_seconds,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_in_flight": [timeline.peak_in_flight(d) for d in range(timeline.num_devices)],
        "spans": timeline.to_records(),
    }


def _save_page(html: Path, record: Mapping[str, object], timeline: Timeline) -> None:
    from stagewise.page.document import environment_here, write_html
    from stagewise.page.page_contents import Page, ShownStep

    page = Page(
        title=f"stagewise simulate: {record['schedule']}",
        summary={
            "step": format_seconds(timeline.duration_seconds),
            "bubble": f"{timeline.bubble_fraction:.1%}",
            "devices": str(record["num_devices"]),
            "microbatches": str(record["num_microbatches"]),
        },
        record=record,
        steps=[ShownStep(str(record["schedule"]), timeline)],
        environment=environment_here(),
    )
    write_html(page, html)
    print(f"wrote {html}: open it in a browser", file=sys.stderr)


def _as_text(schedule: Schedule, recompute: str) -> str:
    return (
        f"# {schedule.name}: {schedule.num_stages} stages on {schedule.num_devices} devices, "
        f"{schedule.num_microbatches} microbatches, recompute {recompute}\n{grid(schedule)}"
    )


def _closed_form(choice: ScheduleChoice, cost: StageCost) -> str:
    """Return the literature's formulas for this schedule on equal stages."""
    row, built = SCHEDULES[choice.name], choice.built
    stages = EqualStages(
        num_devices=built.num_devices,
        num_microbatches=built.num_microbatches,
        stages_per_device=built.num_stages // built.num_devices,
        forward_seconds=cost.forward_seconds,
        input_seconds=cost.input_seconds,
        weight_seconds=cost.weight_seconds,
    )
    said = f"equal stages without recomputation and latency: idle {row.bubble}"
    if row.bubble.holds(stages):
        idle = format_seconds(float(row.bubble.seconds(stages)))
        said += f" = {idle}, bubble {float(row.bubble.fraction(stages)):.1%}"
    else:
        said += ", which does not apply here"
    return f"{said}\nin flight on device d, by stage: {row.in_flight}"


def _schedules_in_words() -> str:
    """Describe every row of SCHEDULES in a few lines, after a legend."""
    lines = [
        "K devices, v stages on each, M microbatches, d a device, g microbatches in a group; F and",
        "B are the seconds of one stage's forward and backward, B = I + W if it is split.",
        "idle: each device's idle time in a step on equal stages; in flight: microbatches held",
        "from forward to backward, summed over a device's stages. With `looped` placement device d",
        "holds stages d, d+K, ...; with `zigzag` the direction alternates.",
    ]
    for name, row in SCHEDULES.items():
        each = f"{row.stages_per_device} per device"
        lines += [
            "",
            f"{name}: {row.summary}",
            f"    stages: {each + ', or any number' * row.takes_any}, {row.placement}",
            f"    idle: {row.bubble}",
            f"    in flight: {row.in_flight}",
            f"    source: {row.source}",
        ]
    return "\n".join(lines)
