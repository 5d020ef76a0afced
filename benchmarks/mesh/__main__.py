"""Every combination of the table: `python -m benchmarks.mesh [--quick] [--json]`."""

import typer

from benchmarks.mesh.compare import Cell
from benchmarks.mesh.table import TOLERANCE, cells_of, plan_of, row_of, run_cells, summary, why_not
from benchmarks.workers import Row, print_rows, run_workers


def main(
    quick: bool = typer.Option(False, help="at most two stages' ranks, and fewer models"),
    json: bool = typer.Option(False, help="one JSON object for each combination"),
) -> None:
    """Compare pipelines on meshes with the plain model, in float64, after three AdamW steps."""
    rows: dict[Cell, Row] = {}
    by_world: dict[int, list[Cell]] = {}
    for cell in cells_of(quick=quick):
        reason = why_not(cell)
        rows[cell] = row_of(cell, f"unsupported: {reason}")
        if reason is None:
            by_world.setdefault(cell.world, []).append(cell)
    for world, cells in sorted(by_world.items()):
        plans = [plan_of(cell) for cell in cells]
        rows.update(zip(cells, run_workers(world, run_cells, cells, plans), strict=True))
    every = [*rows.values()]
    reasons = sorted({str(row["status"]) for row in every} - {"exact"})
    notes = [f"largest relative difference; exact: within {TOLERANCE:g}", *reasons]
    print_rows("Meshes", every if json else summary(every), as_json=json, notes=notes)
    if any(str(row["status"]).isupper() or "FAILS" in str(row["status"]) for row in every):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
