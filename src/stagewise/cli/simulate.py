"""`stagewise simulate`: a schedule and its costs drawn as a timeline. No torch."""

import json
import math
from typing import Annotated

import typer
from rich.console import Console

from stagewise.costs import LinkCost, StageCost
from stagewise.errors import UsageError
from stagewise.planning.simulate import simulate
from stagewise.report import render_timeline
from stagewise.schedule import (
    POLICIES,
    SCHEDULES,
    Schedule,
    named_schedule,
    validate,
    with_recompute,
)
from stagewise.timeline import Timeline


def simulate_command(
    schedule: Annotated[
        str, typer.Option(help=f"Order of work: {' or '.join(sorted(SCHEDULES))}.")
    ] = "1f1b",
    stages: Annotated[
        int, typer.Option(help="Stages that the model is cut into; one device each.")
    ] = 4,
    microbatches: Annotated[
        int, typer.Option(help="Microbatches that the minibatch is split into.")
    ] = 8,
    recompute: Annotated[
        str,
        typer.Option(
            help="Which microbatches store only their inputs and run forward again before their "
            f"backward: {', '.join(POLICIES)}."
        ),
    ] = "never",
    forward: Annotated[
        str,
        typer.Option(
            help="Seconds of one microbatch's forward: one number for all stages, or one per "
            "stage, separated by commas."
        ),
    ] = "1",
    backward: Annotated[str, typer.Option(help="The same for the backward.")] = "2",
    latency: Annotated[
        float, typer.Option(help="Seconds that a message between two devices takes.")
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the drawing.")
    ] = False,
    as_text: Annotated[
        bool, typer.Option("--text", help="Print the schedule itself: a line per device.")
    ] = False,
) -> None:
    """Draw how a pipeline spends one training step, from costs alone: no model, no device.

    Each row is a device and time runs to the right: `F3` is the forward of microbatch 3, `B3` its
    backward, `R3` its recomputation; dots are idle time, the *bubble*. Try more microbatches to
    shrink the bubble, or unequal stages to see who waits for whom:

        stagewise simulate --stages 4 --microbatches 8

        stagewise simulate --schedule gpipe --stages 3 --forward 1,2,1 --backward 2,4,2
    """
    if as_json and as_text:
        raise UsageError("--json and --text were both given; choose one of them")
    plain = named_schedule(schedule, stages, microbatches)
    built = validate(with_recompute(plain, recompute))
    costs = _stage_costs(forward, backward, stages)
    link = LinkCost(latency_seconds=_checked("--latency", latency))
    timeline = simulate(built, costs, link)
    if as_json:
        typer.echo(json.dumps(_as_json(built, recompute, timeline)))
    elif as_text:
        typer.echo(str(built))
    else:
        console = Console()
        console.print(render_timeline(timeline, width=console.width))
        if len(set(costs)) == 1:
            console.print(_closed_form(stages, microbatches), highlight=False, soft_wrap=True)


def _stage_costs(forward: str, backward: str, num_stages: int) -> list[StageCost]:
    forwards = _seconds("--forward", forward, num_stages)
    backwards = _seconds("--backward", backward, num_stages)
    if not any(forwards + backwards):
        raise UsageError("--forward and --backward are all 0; give at least one stage some seconds")
    return [
        StageCost(forward_seconds=f, backward_seconds=b, recompute_seconds=f)
        for f, b in zip(forwards, backwards, strict=True)
    ]


def _seconds(option: str, text: str, num_stages: int) -> list[float]:
    """One cost per stage from a comma list; raises UsageError naming the option."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{option} is {text!r}; give seconds, as in {option} 1 for all stages, or "
            f"{option} {','.join(['1'] * num_stages)} for one each"
        ) from None
    if len(values) not in (1, num_stages):
        raise UsageError(
            f"{option} {text} gives {len(values)} costs for {num_stages} stages; give one cost "
            "for all stages, or one for each"
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
        "num_microbatches": schedule.num_microbatches,
        "recompute": recompute,
        "step_seconds": timeline.duration_seconds,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_in_flight": [timeline.peak_in_flight(d) for d in range(timeline.num_devices)],
        "spans": timeline.to_records(),
    }


def _closed_form(num_stages: int, num_microbatches: int) -> str:
    part, whole = num_stages - 1, num_microbatches + num_stages - 1
    return (
        "equal stages without recomputation and latency: bubble (K-1)/(M+K-1) = "
        f"{part}/{whole} = {part / whole:.1%}"
    )
