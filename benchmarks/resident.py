"""The resident memory of a rank, against torch.distributed.pipelining's.

Two ranks train a Transformer of 8 blocks by 1f1b, M=8; every configuration runs in new processes,
which build the model and delete their reference to it. Counted is the resident set beyond that of
the imports (a separate column): between two steps, including gradients, and at a step's peak. With
recomputation "by block", both systems store each block's input and recompute one block at a time
(`Plan(segments=...)`; `torch.utils.checkpoint`). "By stage" is `Plan(recompute="always")`;
"planned" is the plan of `plan(recompute="always")` with the costs that it measures. After a step
that recomputes, stagewise returns free pages to the system, and torch does not: "pages kept" is
stagewise without that.
"""

import json as jsons
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import typer

from benchmarks.resident_worker import MEBIBYTE, NUM_RANKS
from benchmarks.workers import Row, print_rows

STAGEWISE, TORCH = "stagewise", "torch.distributed.pipelining"
WIDTHS, QUICK_WIDTHS = (512, 768), (256,)
CONFIGURATIONS = (
    (TORCH, "never"),
    (STAGEWISE, "never"),
    (TORCH, "by block"),
    (STAGEWISE, "by block"),
    (STAGEWISE, "by block, pages kept"),
    (STAGEWISE, "by stage"),
    (STAGEWISE, "planned"),
)
LIMIT_SECONDS = 300
Found = dict[str, float]  # of one rank, medians of the repetitions


def main(
    quick: bool = typer.Option(False, help="One small model, once; takes less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
    repeats: int = typer.Option(3, min=1, help="Processes for each configuration; medians count."),
) -> None:
    """Measure what two ranks hold of a model in training."""
    rows: list[Row] = []
    for width in QUICK_WIDTHS if quick else WIDTHS:
        found = measured(width, 1 if quick else repeats)
        rows += rows_of(width, found)
    notes = [
        "MiB beyond the imports, by rank; ratio: over torch.distributed.pipelining's with the same "
        "recomputation (all that recomputes: over its by block); total: imports included",
    ]
    print_rows("resident set of a rank in training", rows, as_json=json, notes=notes)


def measured(width: int, repeats: int) -> dict[tuple[str, str], list[Found]]:
    """For every configuration what each rank held; repetitions alternate."""
    runs: dict[tuple[str, str], list[list[Found]]] = {key: [] for key in CONFIGURATIONS}
    for _ in range(repeats):
        for key in CONFIGURATIONS:
            runs[key].append(run(*key, width))
    return {key: list(map(_median, zip(*found, strict=True))) for key, found in runs.items()}


def run(system: str, recompute: str, width: int) -> list[Found]:
    """One configuration in new processes; by rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        command = [sys.executable, "-m", "benchmarks.resident_worker"]
        workers = [
            subprocess.Popen(
                [*command, str(rank), store, system, str(width), recompute],
                stdout=subprocess.PIPE,
                env=environment,
            )
            for rank in range(NUM_RANKS)
        ]
        try:
            outputs = [worker.communicate(timeout=LIMIT_SECONDS)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    return [jsons.loads(output.splitlines()[-1]) for output in outputs]


def rows_of(width: int, found: dict[tuple[str, str], list[Found]]) -> Iterator[Row]:
    """One row for each configuration and rank."""
    for (system, recompute), ranks in found.items():
        peers = found[TORCH, "never" if recompute == "never" else "by block"]
        for rank, (own, peer) in enumerate(zip(ranks, peers, strict=True)):
            yield {
                "width": width,
                "recompute": recompute,
                "system": system,
                "rank": rank,
                "imports": own["import"] / MEBIBYTE,
                "between": own["between"] / MEBIBYTE,
                "peak": own["peak"] / MEBIBYTE,
                "between_ratio": own["between"] / peer["between"],
                "peak_ratio": own["peak"] / peer["peak"],
                "total_peak_ratio": (own["import"] + own["peak"]) / (peer["import"] + peer["peak"]),
            }


def _median(runs: tuple[Found, ...]) -> Found:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


if __name__ == "__main__":
    typer.run(main)
