"""`stagewise schedules`: all schedules for the same devices and microbatches, one by one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from stagewise.costs import StageCost
from stagewise.errors import StagewiseError, UsageError
from stagewise.planning import simulate
from stagewise.schedule import SCHEDULES, named_schedule
from stagewise.timeline import Timeline
from stagewise.timeline.timeline_picture import render_timeline

_MOST = 20_000  # instructions of a schedule that is drawn
_TWO_BESIDE_EACH_OTHER = 150  # columns


@dataclass(frozen=True)
class _Drawn:
    name: str
    stages_per_device: int
    timeline: Timeline

    @property
    def most_in_flight(self) -> int:
        devices = range(self.timeline.num_devices)
        return max(self.timeline.peak_in_flight(device) for device in devices)


def schedules_command(
    devices: Annotated[
        int, typer.Option("--devices", "-K", min=1, metavar="N", help="Number of devices.")
    ] = 4,
    microbatches: Annotated[
        int,
        typer.Option("--microbatches", "-M", min=1, metavar="N", help="Number of microbatches."),
    ] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the drawings.")
    ] = False,
) -> None:
    """Draw all schedules for the same devices and microbatches, the smallest bubble first.

    A backward takes twice as long as a forward, and links are free. Every device has the same work
    in all of them: where it has several stages, each is as much smaller.

    Example: stagewise schedules -K 4 -M 8
    """
    if 4 * devices * microbatches > _MOST:
        raise UsageError(
            f"{devices} devices with {microbatches} microbatches are too many to draw; use "
            "stagewise simulate for one schedule, or smaller numbers"
        )
    drawn, others = _drawn(devices, microbatches)
    if as_json:
        typer.echo(json.dumps([_record(each) for each in drawn], indent=2))
        return
    console = Console()
    beside = console.width >= _TWO_BESIDE_EACH_OTHER
    width = (console.width - 4) // 2 if beside else console.width
    pictures = [_picture(each, width) for each in drawn]
    console.print(Columns(pictures, padding=(1, 2)) if beside else Group(*pictures))
    console.print(_table(drawn, devices, microbatches))
    for line in others:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _drawn(devices: int, microbatches: int) -> tuple[list[_Drawn], list[str]]:
    """Return the schedules, the smallest bubble first, and why others are not possible."""
    drawn, others = [], []
    for name, row in SCHEDULES.items():
        each = row.stages_per_device
        try:
            built = named_schedule(name, devices, microbatches)
        except StagewiseError as error:
            others.append(f"{name}: {error}")
            continue
        one = StageCost(
            forward_seconds=1 / each,
            backward_seconds=2 / each,
            recompute_seconds=1 / each,
            input_seconds=1 / each,
            weight_seconds=1 / each,
        )
        drawn.append(_Drawn(name, each, simulate(built, [one] * built.num_stages)))
    return sorted(drawn, key=lambda each: each.timeline.bubble_fraction), others


def _picture(drawn: _Drawn, width: int) -> RenderableType:
    lines = list(_lines(render_timeline(drawn.timeline, width=width)))
    bars = lines[: 1 + drawn.timeline.num_devices]
    bubble = f"bubble {drawn.timeline.bubble_fraction:.1%}"
    return Group(Text.assemble((drawn.name, "bold"), f"  {bubble}"), *bars, Text())


def _lines(picture: RenderableType) -> Iterator[RenderableType]:
    assert isinstance(picture, Group)
    yield from picture.renderables


def _table(drawn: list[_Drawn], devices: int, microbatches: int) -> Table:
    table = Table(
        title=f"{devices} devices, {microbatches} microbatches (forward 1, backward 2)",
        title_justify="left",
    )
    for heading in ("schedule", "stages on a device", "step", "bubble", "most in flight"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for each in drawn:
        table.add_row(
            each.name,
            str(each.stages_per_device),
            f"{each.timeline.duration_seconds:.4g}",
            f"{each.timeline.bubble_fraction:.1%}",
            f"{each.most_in_flight / each.stages_per_device:.3g} microbatches",
        )
    table.caption = "in flight: activations of so many whole microbatches on the busiest device"
    return table


def _record(drawn: _Drawn) -> dict[str, object]:
    return {
        "schedule": drawn.name,
        "stages_per_device": drawn.stages_per_device,
        "step_seconds": drawn.timeline.duration_seconds,
        "bubble_fraction": drawn.timeline.bubble_fraction,
        "most_in_flight": drawn.most_in_flight / drawn.stages_per_device,
        "spans": drawn.timeline.to_records(),
    }
