"""How long does a search take? From 24 cells on 4 devices to 1,000 cells on 256.

The costs are random, not measured: unequal cells, each with a fixed part per microbatch, and fast
links. Every row searches all schedules, three numbers of microbatches, cuts and, under a memory
cap, recomputation; a bar shows the progress.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import typer

from benchmarks.workers import Row, print_rows
from stagewise.cli.plan_search import progress_bar
from stagewise.costs import CellCost, LinkCost
from stagewise.planning import SearchResult, search
from stagewise.planning.search.search import CostsAt

LINK = LinkCost(latency_seconds=1e-5, seconds_per_byte=1e-10)
SAMPLES, FIXED_SECONDS = 1024, 1e-3
CAP = 0.25  # of what the fastest plan without a cap needs


@dataclass(frozen=True)
class Case:
    """One row: a chain, a number of devices, and whether memory is short."""

    num_cells: int
    num_devices: int
    capped: bool


CASES = [Case(24, 4, False), Case(100, 8, False), Case(100, 8, True), Case(1000, 256, False)]


def main(
    quick: bool = typer.Option(False, help="Without the last row; takes less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Time the search for the fastest plan."""
    cases = CASES[:-1] if quick else CASES
    rows = [_row(case) for case in cases]
    print_rows("search for the fastest plan", rows, as_json=json, notes=())


def _row(case: Case) -> Row:
    costs_at = costs(case.num_cells)
    counts = [case.num_devices * each for each in (1, 2, 4)]
    cap = None
    with progress_bar(True) as progress:
        if case.capped:
            free = _searched(case, costs_at, counts, None, lambda done, total, what: None)
            cap = CAP * max(free.chosen.device_bytes)
        start = time.perf_counter()
        found = _searched(case, costs_at, counts, cap, progress)
        plan = found.plan
        seconds = time.perf_counter() - start
    return {
        "num_cells": case.num_cells,
        "num_devices": case.num_devices,
        "memory_bytes": cap,
        "seconds": seconds,
        "partitions": found.work.partitions,
        "simulations": found.work.simulations,
        "instructions": found.work.instructions,
        "plan": str(found.chosen),
        "step_seconds": plan.timeline.duration_seconds,
        "lower_bound_seconds": found.bound_seconds,
    }


def _searched(
    case: Case,
    costs_at: CostsAt,
    counts: list[int],
    cap: float | None,
    progress: Callable[[int, int, str], None],
) -> SearchResult:
    return search(
        costs_at,
        case.num_devices,
        num_microbatches=counts,
        memory_bytes=cap,
        link=LINK,
        progress=progress,
    )


def costs(num_cells: int) -> CostsAt:
    """Unequal cells; a microbatch of half the samples costs half, and a fixed part."""
    rng = random.Random(num_cells)
    weights = [rng.uniform(0.2, 2) for _ in range(num_cells)]

    def costs_at(num_microbatches: int) -> list[CellCost]:
        size = SAMPLES / num_microbatches
        return [
            CellCost(
                name=f"cell {index}",
                forward_seconds=weight * size * 1e-3 + FIXED_SECONDS,
                backward_seconds=2 * (weight * size * 1e-3 + FIXED_SECONDS),
                input_seconds=weight * size * 1e-3 + FIXED_SECONDS,
                weight_seconds=weight * size * 1e-3 + FIXED_SECONDS,
                parameter_bytes=10**7,
                activation_bytes=int(weight * size * 1e6),
                output_bytes=int(size * 1e5),
                gradient_bytes=int(size * 1e5),
                deferred_bytes=int(weight * size * 5e5),
            )
            for index, weight in enumerate(weights)
        ]

    return costs_at


if __name__ == "__main__":
    typer.run(main)
