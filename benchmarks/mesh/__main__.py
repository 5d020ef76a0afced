"""Every combination of the table: `python -m benchmarks.mesh [--quick] [--json]`."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from benchmarks.mesh.checkpoints import checkpoint_rows
from benchmarks.mesh.compare import Cell
from benchmarks.mesh.table import TOLERANCE, cells_of, plan_of, row_of, run_cells, summary, why_not
from benchmarks.mesh.torch_side import with_torch
from benchmarks.workers import Row, print_rows, run_workers

_AT_ONCE = 8  # cells, in processes that are started once


def main(
    quick: bool = typer.Option(False, help="at most two stages' ranks, and fewer models"),
    as_json: bool = typer.Option(False, "--json", help="one JSON object for each combination"),
    torch: bool = typer.Option(
        False, help="torch.distributed.pipelining beside those of two stages"
    ),
    checkpoints: bool = typer.Option(False, help="the matrix of checkpoints instead"),
    only: str = typer.Option("", help="only combinations that have these words, as in 'pp=2 TP'"),
    kept: Path | None = typer.Option(
        None, "--continue", help="a file that gets a JSON line after each; those in it are done"
    ),
    minutes: float = typer.Option(0, help="start no more after so long [default: no limit]"),
) -> None:
    """Compare pipelines on meshes with the plain model, in float64, after three AdamW steps."""
    if checkpoints:
        found = checkpoint_rows()
        print_rows("Checkpoints", found, as_json=as_json, notes=["equal: to the bit"])
        if any(value != "equal" for row in found for k, value in row.items() if k != "saved under"):
            raise typer.Exit(1)
        return
    wanted = [c for c in cells_of(quick=quick) if all(w in _words(c) for w in only.split())]
    if torch:
        wanted = [cell for cell in wanted if cell.pp == 2 and cell.schedule != "auto"]
    if not wanted:
        raise typer.BadParameter(f"no combination has all the words of {only!r}")
    rows = _known(kept)
    deadline = time.monotonic() + (60 * minutes or float("inf"))
    for part in _parts([cell for cell in wanted if cell not in rows]):
        if time.monotonic() > deadline:
            break
        plans = [plan_of(cell) for cell in part]
        for row in run_workers(part[0].world, run_cells, part, plans):
            _keep(kept, rows, row)
    for cell, row in list(rows.items()) if torch else []:
        if cell in wanted and "torch" not in row and time.monotonic() < deadline:
            _keep(kept, rows, with_torch(row))
    for cell in wanted:
        if (reason := why_not(cell)) is not None:
            rows.setdefault(cell, row_of(cell, f"unsupported: {reason}"))
    every = [rows[cell] for cell in wanted if cell in rows]
    if not every:
        raise typer.BadParameter("no time for any; give more --minutes")
    reasons = sorted({str(row["status"]) for row in every} - {"exact"})
    notes = [f"largest relative difference; exact: within {TOLERANCE:g}", *reasons]
    print_rows("Meshes", every if as_json else summary(every), as_json=as_json, notes=notes)
    if any(str(row["status"]).isupper() or "FAILS" in str(row["status"]) for row in every):
        raise typer.Exit(1)


def _parts(cells: Sequence[Cell]) -> Iterator[Sequence[Cell]]:
    """Yield those that can be run, a few at once, those of few ranks first."""
    possible = [cell for cell in cells if why_not(cell) is None]
    for world in sorted({cell.world for cell in possible}):
        own = [cell for cell in possible if cell.world == world]
        yield from (own[at : at + _AT_ONCE] for at in range(0, len(own), _AT_ONCE))


def _words(cell: Cell) -> list[str]:
    return [f"pp={cell.pp}", cell.inner, cell.schedule, cell.model]


def _cell_of(row: Row) -> Cell:
    return Cell(*(row[key] for key in ("pp", "inner", "schedule", "model")))  # type: ignore[arg-type]


def _known(kept: Path | None) -> dict[Cell, Row]:
    if kept is None or not kept.exists():
        return {}
    return {_cell_of(row): row for row in map(json.loads, kept.read_text().splitlines())}


def _keep(kept: Path | None, rows: dict[Cell, Row], row: Row) -> None:
    rows[_cell_of(row)] = row
    if kept is not None:
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
