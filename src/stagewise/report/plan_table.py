"""Plans and results as tables: predictions beside measurements."""

import re
from collections.abc import Callable, Sequence
from statistics import fmean

from rich.table import Table

from stagewise.costs import FREE_INSTRUCTION, CellCost
from stagewise.planning import Plan
from stagewise.planning.plan_words import Figures, predicted
from stagewise.report import format_seconds
from stagewise.units import size_in_words

MANY_CELLS = 24  # more are shown by kind


def cells_table(plan: Plan) -> Table:
    """Each cell's costs for one microbatch, and the stage it is on; of many, one row per kind."""
    stages = [stage for stage, size in enumerate(plan.balance) for _ in range(size)]
    placed = list(zip(stages, plan.cells, strict=True))
    grouped = len(placed) > MANY_CELLS
    kinds = _kinds(placed) if grouped else [[each] for each in placed]
    table = Table(title="Cells (one microbatch)", title_justify="left")
    table.add_column("cell", overflow="fold")
    for heading in ("stage", "forward", "backward", "parameters", "activations", "output"):
        table.add_column(heading, justify="right", overflow="fold")
    for kind in kinds:
        (first, cell), (last, _) = kind[0], kind[-1]
        table.add_row(
            cell.name if len(kind) == 1 else f"{_pattern(cell.name)}: {len(kind)} alike",
            str(first) if first == last else f"{first} to {last}",
            _time(fmean(each.forward_seconds for _, each in kind)),
            _time(fmean(each.backward_seconds for _, each in kind)),
            _size(cell.parameter_bytes),
            _size(cell.activation_bytes),
            _size(cell.output_bytes),
        )
    notes = ["mean times of cells alike"] * grouped + _overhead(plan)
    table.caption = "; ".join(notes) or None
    return table


def _kinds(placed: Sequence[tuple[int, CellCost]]) -> list[list[tuple[int, CellCost]]]:
    """Return the cells in groups with one name but for numbers, and equal sizes."""
    kinds: dict[object, list[tuple[int, CellCost]]] = {}
    for stage, cell in placed:
        sizes = cell.parameter_bytes, cell.activation_bytes, cell.output_bytes
        kinds.setdefault((_pattern(cell.name), sizes), []).append((stage, cell))
    return list(kinds.values())


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _overhead(plan: Plan) -> list[str]:
    """Return what an instruction takes beyond its cells, or how far it stays below them."""
    cost = plan.cells[0].instruction_overhead if plan.cells else FREE_INSTRUCTION
    both = {"forward": cost.forward_seconds, "backward": cost.backward_seconds}
    said = {
        "overhead per instruction": {k: s for k, s in both.items() if s > 0},
        "trial steps were faster than the cells alone, per instruction": {
            k: -s for k, s in both.items() if s < 0
        },
    }
    return [
        f"{what}: {', '.join(f'{kind} {_time(seconds)}' for kind, seconds in each.items())}"
        for what, each in said.items()
        if each
    ]


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
