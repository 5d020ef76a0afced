"""Costs as a plan's file holds them, read without trust."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from stagewise.costs import CellCost, FarOutput, InstructionCost


def read_cells(written: Sequence[Mapping[str, Any]]) -> tuple[CellCost, ...]:
    """Read all cells; raise ValueError if one sends something to where no cell is."""
    cells = tuple(map(_cell_of, written))
    for index, cell in enumerate(cells):
        for distance, *_ in cell.far_outputs:
            if distance not in range(2, len(cells) - index):
                raise ValueError(f"cell {index} sends {distance} cells further")
    return cells


def _cell_of(written: Mapping[str, Any]) -> CellCost:
    """Read a cell from JSON; older plans call the instruction overhead `around`, or have none."""
    own = {"instruction_overhead": {}, **written}
    given = own.pop("around", own["instruction_overhead"])
    own["instruction_overhead"] = InstructionCost(**{k: float(v) for k, v in given.items()})
    own["far_outputs"] = tuple(FarOutput(*skip) for skip in own.get("far_outputs", ()))
    for skip in own["far_outputs"]:
        for name, value in zip(FarOutput._fields, skip, strict=True):
            check_amount(name, value)
    optional = {field.name for field in fields(CellCost) if field.default is None}
    for name, value in own.items():
        if name == "name":
            str.encode(value)  # a TypeError for what is no text
        elif name not in ("instruction_overhead", "far_outputs") and (
            value is not None or name not in optional
        ):
            check_amount(name, value)
    return CellCost(**own)


def check_amount(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a time or a size."""
    if not isinstance(value, int | float) or not 0 <= value < 1e300:
        raise ValueError(f"{name} is {str(value)[:40]}, which is not an amount")
