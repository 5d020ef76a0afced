"""Rows of trials as a table in Markdown: one line for every kind of fault, torch's beside ours."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chaos.trial import ROUNDING

Found = dict[str, Any]
_HEAD = (
    "| fault | tried | named | seconds: median (most) | resumed | went on | largest difference | "
    "left behind | torch: seconds | torch: named | torch says |"
)


def rows_in(path: Path) -> list[Found]:
    """Return the rows in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def failed(rows: Sequence[Found]) -> tuple[list[Found], list[Found], list[Found]]:
    """Return the rows whose run was lost, whose cause was not named, that left something."""
    lost = [row for row in rows if not row["resumed"] or not _is_equal(row)]
    return lost, [r for r in rows if not r["named"]], [r for r in rows if r["left_behind"]]


def _is_equal(row: Found) -> bool:
    return bool(row["difference"] <= ROUNDING * row["went_on"])


def as_markdown(rows: Sequence[Found]) -> str:
    """Return the table."""
    ours = [row for row in rows if "said" not in row]
    torchs = {row["fault"]: row for row in rows if "said" in row}
    lines = [_HEAD, "|" + " --- |" * _HEAD.strip("| ").count("|") + " --- |"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        lines.append(_line(fault, [r for r in ours if r["fault"] == fault], torchs.get(fault)))
    lost, unnamed, left = map(len, failed(ours))
    layouts = ", ".join(dict.fromkeys(str(row["layout"]) for row in ours))
    said = (
        f"{len(ours)} faults: {lost} runs lost, {unnamed} causes not named, {left} left something."
    )
    return "\n".join([*lines, "", f"{said} Layouts: {layouts}."])


def _line(fault: str, ours: Sequence[Found], torchs: Found | None) -> str:
    cells = ["-"] * 7
    if ours:
        seconds = [row["seconds"] for row in ours if row["seconds"]]
        took = f"{median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"
        number, far = len(ours), max(row["difference"] for row in ours)
        cells = [
            f"{number}",
            f"{sum(row['named'] for row in ours)}",
            took,
            f"{sum(row['resumed'] for row in ours)}",
            f"{sum(row['went_on'] for row in ours)}",
            f"{far:.1e}" if far else "0",
            f"{sum(row['left_behind'] for row in ours)}",
        ]
    beside = ["-"] * 3
    if torchs is not None:
        took = "no end" if torchs["seconds"] is None else f"{torchs['seconds']:.1f}"
        beside = [took, "yes" if torchs["named"] else "no", f"`{torchs['said']}`"]
    return "| " + " | ".join([fault, *cells, *beside]) + " |"
