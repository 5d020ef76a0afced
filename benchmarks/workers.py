"""Running a benchmark's function in worker processes, and printing its rows."""

import json
import logging
import os
import platform
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

Result = TypeVar("Result")
Row = Mapping[str, str | int | float | None]

# Freed memory stays with the process: returning it makes every step fault its pages in again,
# which adds noise to all systems alike.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
}


def run_workers(num_workers: int, function: Callable[..., Result], *arguments: object) -> Result:
    """Call `function(*arguments)` in every worker, gloo ready; returns rank 0's result."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    os.environ.update(_ENVIRONMENT)
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_workers,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        results: dict[int, Result] = elastic_launch(config, _worker)(function, *arguments)
    return results[0]


def _worker(function: Callable[..., Result], *arguments: object) -> Result:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def print_rows(title: str, rows: Sequence[Row], *, as_json: bool, notes: Sequence[str]) -> None:
    """One JSON object a row, or a table with the machine and `notes` below."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(
        f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}", *notes, sep="\n"
    )


def _text(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
    return "-" if value is None else str(value)
