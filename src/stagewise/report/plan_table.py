"""Plans and results as tables: predictions beside measurements."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from stagewise.costs import FREE_INSTRUCTION
from stagewise.planning import Plan
from stagewise.report import format_seconds
from stagewise.units import size_in_words


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Predicted or measured figures of one step; None if unknown."""

    step_seconds: float | None
    bubble_fraction: float | None
    peak_activation_bytes: tuple[int, ...]


def predicted(plan: Plan) -> Figures:
    """Return a plan's predictions; none if its cells were not measured."""
    if not plan.cells:
        return Figures(step_seconds=None, bubble_fraction=None, peak_activation_bytes=())
    return Figures(
        step_seconds=plan.timeline.duration_seconds,
        bubble_fraction=plan.timeline.bubble_fraction,
        peak_activation_bytes=plan.peak_activation_bytes,
    )


def cut_in_words(plan: Plan, names: Sequence[str]) -> str:
    """Return one line per stage with its cells."""
    lines, start = [], 0
    for stage, size in enumerate(plan.balance):
        own = names[start : start + size]
        cells = own[0] if size == 1 else f"{own[0]} to {own[-1]}"
        lines.append(f"stage {stage}: {size} cell{'s' if size > 1 else ''} ({cells})")
        start += size
    return "\n".join(lines)


def _segments(plan: Plan) -> str:
    """Return how many cells are recomputed, and in how many segments, if there are any."""
    parts = [part for own in plan.segments for part in own]
    again = sum(size for size, recomputed in parts if recomputed)
    cells = sum(plan.balance)
    return f" ({again} of {cells} cells, in {len(parts)} segments)" if parts else ""


def plan_in_words(plan: Plan) -> str:
    """Return the cut and the predictions of a plan as text."""
    figures = predicted(plan)
    memory = ", ".join(_size(number) for number in figures.peak_activation_bytes)
    names = [cell.name for cell in plan.cells] or [*map(str, range(sum(plan.balance)))]
    head = (
        f"{cut_in_words(plan, names)}\n"
        f"schedule {plan.schedule}, {plan.num_microbatches} microbatches, recompute "
        f"{plan.recompute}{_segments(plan)}\n"
    )
    if not plan.cells:
        return (
            f"{head}predicted: nothing, because a model on the meta device cannot be measured, or "
            "the plan was written without costs"
        )
    return (
        f"{head}predicted: step {_time(figures.step_seconds)}, bubble "
        f"{_percent(figures.bubble_fraction)}, activations {memory}"
    )


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
