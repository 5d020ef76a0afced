"""A plan's fields as its file holds them, read without trust."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from stagewise.costs import CellCost, FarOutput, InstructionCost, LinkCost


def read_fields(written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a plan from those in its JSON, some of which older ones lack."""
    amounts = {"input_bytes": written["input_bytes"], **written["link"]}
    if written.get("measured_seconds") is not None:
        amounts["measured_seconds"] = written["measured_seconds"]
    speeds = tuple(written.get("speeds", ()))
    for name, value in [*amounts.items(), *(("speeds", speed) for speed in speeds)]:
        check_amount(name, value)
    if not all(speeds):
        raise ValueError("a device has the speed 0")
    plain = "schedule", "num_microbatches", "recompute", "input_bytes"
    return {
        **{name: written[name] for name in plain},
        "balance": tuple(written["balance"]),
        "stages_per_device": written.get("stages_per_device"),
        "replicas": tuple(written.get("replicas", ())),
        "programs": tuple(written.get("programs", ())),
        "segments": tuple(
            tuple((int(size), bool(recomputed)) for size, recomputed in parts)
            for parts in written.get("segments", ())
        ),
        "cells": read_cells(written["cells"]),
        "link": LinkCost(**written["link"]),
        "speeds": speeds,
        "measured_seconds": amounts.get("measured_seconds"),
        "machine": str(written.get("machine", "")),
        "regathered": tuple(written.get("regathered", ())),
        "gathers_ahead": bool(written.get("gathers_ahead", True)),
    }


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
