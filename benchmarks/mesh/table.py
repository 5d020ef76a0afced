"""The cells of the table, the processes that run them, and what is said of each."""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

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
from benchmarks.workers import Row

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
    if (reason := INNER[cell.inner].why_not.get(cell.model)) is not None:
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
        outcome: Outcome | str
        try:
            outcome = on_mesh(cell, plan)
        except (stagewise.StagewiseError, RuntimeError) as error:
            outcome = f"{type(error).__name__}: {error}"
        every: list[Outcome | str] = [""] * dist.get_world_size()
        dist.gather_object(outcome, every if dist.get_rank() == 0 else None)
        if dist.get_rank() == 0:
            key = cell.model, INNER[cell.inner].num_parts
            if key not in references:
                references[key] = plain(cell)
            rows.append(judged(cell, every, references[key]))
    return rows


def judged(cell: Cell, every: Sequence[Outcome | str], reference: Outcome) -> Row:
    """Return the row of a cell from what came of it on every rank."""
    failed = [one for one in every if isinstance(one, str)]
    if failed:
        return row_of(cell, f"FAILS: {failed[0]}")
    found = differences([one for one in every if isinstance(one, Outcome)], reference)
    numbers = found.loss, found.gradient, found.parameter
    return row_of(cell, "exact" if max(numbers) <= TOLERANCE else "DIFFERS", numbers)


def cells_of(*, quick: bool) -> Iterator[Cell]:
    """Yield the cells of the table."""
    for pp, inner, schedule, model in itertools.product((1, 2, 4), INNER, SCHEDULES, MODELS):
        cell = Cell(pp, inner, schedule, model)
        is_small = (
            pp < 4
            and cell.world <= 8
            and schedule != "auto"
            and (model == "decoder" or schedule == "1f1b")
        )
        if not quick or is_small:
            yield cell


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each way to treat stages and each schedule: the worst of all models, by `pp`."""
    lines: dict[tuple[object, object], dict[str, str | int | float | None]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["inner"], row["schedule"]), {"inner": row["inner"], "schedule": row["schedule"]}
        )
        numbers = [row[f"{what}_difference"] for what in ("loss", "gradient", "parameter")]
        found = [number for number in numbers if isinstance(number, float)]
        before = line.get(f"pp={row['pp']}")
        if not found:
            line.setdefault(f"pp={row['pp']}", str(row["status"]).split(":")[0])
        elif not isinstance(before, float) or before < max(found):
            line[f"pp={row['pp']}"] = max(found)
    columns = ["inner", "schedule", *sorted({f"pp={row['pp']}" for row in rows})]
    return [{column: line.get(column) for column in columns} for line in lines.values()]
