"""Run a benchmark's function in worker processes, and print its rows."""

import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.distributed.launcher.api import elastic_launch

from stagewise.training.workers.launch import launch_config, worker_environment

Result = TypeVar("Result")
Row = Mapping[str, str | int | float | None]


def run_workers(num_workers: int, function: Callable[..., Result], *arguments: object) -> Result:
    """Call `function(*arguments)` in every worker, gloo ready; returns rank 0's result."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    os.environ.update({**worker_environment(num_workers), "OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory() as logs:
        config = launch_config(num_workers, logs, signals="SIGTERM,SIGINT")
        results: dict[int, Result] = elastic_launch(config, _worker)(function, *arguments)
    return results[0]


def _worker(function: Callable[..., Result], *arguments: object) -> Result:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def keep_to_core() -> None:
    """Pin this worker to one of the machine's cores, neighbours to different ones.

    The host of a real device would have its own core, and caches that others do not evict.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[dist.get_rank() % len(cores)]})


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
        table.add_row(*(escape(_text(value)) for value in row.values()))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(
        f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}", *notes, sep="\n"
    )


def _text(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
    return "-" if value is None else str(value)
