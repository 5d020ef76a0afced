"""Plans and results as tables: predictions beside measurements."""

from collections.abc import Callable

from rich.table import Table

from stagewise.costs import FREE_INSTRUCTION
from stagewise.planning import Plan
from stagewise.planning.plan_words import Figures, predicted
from stagewise.report import format_seconds
from stagewise.units import size_in_words


def cells_table(plan: Plan) -> Table:
    """Each cell's costs for one microbatch, and the stage it is on."""
    table = _table("Cells (one microbatch)", "cell", "stage", "forward", "backward")
    for heading in ("parameters", "activations", "output"):
        table.add_column(heading, justify="right")
    stages = [stage for stage, size in enumerate(plan.balance) for _ in range(size)]
    for stage, cell in zip(stages, plan.cells, strict=True):
        table.add_row(
            cell.name,
            str(stage),
            _time(cell.forward_seconds),
            _time(cell.backward_seconds),
            _size(cell.parameter_bytes),
            _size(cell.activation_bytes),
            _size(cell.output_bytes),
        )
    overhead = plan.cells[0].instruction_overhead if plan.cells else FREE_INSTRUCTION
    if overhead != FREE_INSTRUCTION:
        table.caption = (
            f"overhead per instruction: forward {_time(overhead.forward_seconds)}, backward "
            f"{_time(overhead.backward_seconds)}"
        )
    return table


def devices_table(plan: Plan) -> Table:
    """Return each device's share of one predicted step, and its memory."""
    figures, costs = predicted(plan), plan.stage_costs
    table = _table("Devices (one step)", "device", "stages", "cells", "busy", "idle", "parameters")
    table.add_column("peak activations", justify="right")
    duration = plan.timeline.duration_seconds
    for device, busy in enumerate(plan.timeline.busy_seconds):
        stages = plan.built_schedule.stages_of(device)
        table.add_row(
            str(device),
            ", ".join(map(str, stages)),
            str(sum(plan.balance[stage] for stage in stages)),
            _time(busy),
            _percent(1 - busy / duration if duration else 0.0),
            _size(sum(costs[stage].parameter_bytes for stage in stages)),
            _size(figures.peak_activation_bytes[device]),
        )
    return table


def comparison_table(expected: Figures, measured: Figures) -> Table:
    """Return predicted and measured figures side by side."""
    table = _table("Prediction and measurement", "", "predicted", "measured", "difference")

    def row(
        what: str, left: float | None, right: float | None, show: Callable[[float | None], str]
    ) -> None:
        ratio = f"{right / left - 1:+.1%}" if left and right is not None else ""
        table.add_row(what, show(left), show(right), ratio)

    row("step time", expected.step_seconds, measured.step_seconds, _time)
    table.add_row(
        "bubble", _percent(expected.bubble_fraction), _percent(measured.bubble_fraction), ""
    )
    right = measured.peak_activation_bytes
    left = expected.peak_activation_bytes or (None,) * len(right)
    if len(left) == len(right):
        for device, peaks in enumerate(zip(left, right, strict=True)):
            row(f"peak activations, device {device}", *peaks, _size)
    else:  # one process ran several devices' programs
        row("peak activations, all devices", None, sum(right), _size)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def _size(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else size_in_words(num_bytes)
