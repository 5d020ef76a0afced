"""Every combination of the table: `python -m benchmarks.mesh [--quick] [--json]`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
import typer

import stagewise
from benchmarks.mesh.compare import (
    NUM_MICROBATCHES,
    Cell,
    Outcome,
    batches,
    differences,
    on_mesh,
    plain,
)
from benchmarks.mesh.inner import INNER
from benchmarks.mesh.subjects import MODELS, built
from benchmarks.workers import Row, print_rows, run_workers

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_v", "auto")
TOLERANCE, MOST_RANKS = 1e-11, 16


def plan_of(cell: Cell) -> stagewise.Plan:
    """Return the plan of a cell; made once, in one process, since measurements differ."""
    if cell.schedule == "auto":
        batch = batches(8, 1)[0]
        loss = torch.nn.functional.cross_entropy
        return stagewise.plan(
            built(cell.model),
            batch.tokens,
            target=batch.target,
            loss=loss,
            num_devices=cell.pp,
            num_microbatches=NUM_MICROBATCHES,
        )
    num_stages = cell.pp * (2 if cell.schedule in ("interleaved", "zb_v") else 1)
    small, extra = divmod(len(built(cell.model)), num_stages)
    balance = tuple(small + (stage < extra) for stage in range(num_stages))
    return stagewise.Plan(
        balance=balance, schedule=cell.schedule, num_microbatches=NUM_MICROBATCHES
    )


def why_not(cell: Cell) -> str | None:
    """Say why a cell is not run, if it is not."""
    if (reason := INNER[cell.inner].why_not) is not None:
        return reason
    if cell.world > MOST_RANKS:
        return f"needs {cell.world} processes, and this table runs at most {MOST_RANKS}"
    return None


def row_of(cell: Cell, status: str, found: Sequence[float | None] = (None, None, None)) -> Row:
    """Return a row of the table."""
    return {
        "pp": cell.pp,
        "inner": cell.inner,
        "schedule": cell.schedule,
        "model": cell.model,
        "world": cell.world,
        "loss_difference": found[0],
        "gradient_difference": found[1],
        "parameter_difference": found[2],
        "status": status,
    }


def run_cells(cells: Sequence[Cell], plans: Sequence[stagewise.Plan]) -> list[Row]:
    """Run cells one after the other on every rank; rank 0 returns their rows."""
    rows, references = [], dict[tuple[str, int], Outcome]()
    for cell, plan in zip(cells, plans, strict=True):
        outcome = on_mesh(cell, plan)
        every: list[Outcome | None] = [None] * dist.get_world_size()
        dist.gather_object(outcome, every if dist.get_rank() == 0 else None)
        if dist.get_rank() == 0:
            key = cell.model, INNER[cell.inner].num_parts
            if key not in references:
                references[key] = plain(cell)
            found = differences([one for one in every if one is not None], references[key])
            numbers = found.loss, found.gradient, found.parameter
            status = "exact" if max(numbers) <= TOLERANCE else "DIFFERS"
            rows.append(row_of(cell, status, numbers))
    return rows


def cells_of(*, quick: bool) -> Iterator[Cell]:
    """Yield the cells of the table."""
    for pp, inner, schedule, model in itertools.product((1, 2, 4), INNER, SCHEDULES, MODELS):
        cell = Cell(pp, inner, schedule, model)
        is_small = pp < 4 and schedule != "auto" and (model == "decoder" or schedule == "1f1b")
        if not quick or is_small:
            yield cell


def main(
    quick: bool = typer.Option(False, help="fewer models a schedule, at most two stages' ranks"),
    json: bool = typer.Option(False, help="one JSON object a row"),
) -> None:
    """Compare pipelines on meshes with the plain model, in float64, after three AdamW steps."""
    rows: dict[Cell, Row] = {}
    by_world: dict[int, list[Cell]] = {}
    for cell in cells_of(quick=quick):
        reason = why_not(cell)
        if reason is not None:
            rows[cell] = row_of(cell, f"unsupported: {reason}")
        else:
            rows[cell] = {}
            by_world.setdefault(cell.world, []).append(cell)
    for world, cells in sorted(by_world.items()):
        plans = [plan_of(cell) for cell in cells]
        rows.update(zip(cells, run_workers(world, run_cells, cells, plans), strict=True))
    finished: list[Mapping[str, str | int | float | None]] = [*rows.values()]
    print_rows("Meshes", finished, as_json=json, notes=[f"exact: within {TOLERANCE:g}"])
    if any(row["status"] == "DIFFERS" for row in finished):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
