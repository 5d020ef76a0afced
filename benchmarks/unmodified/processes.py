"""A row of the table, made in processes of its own that may take so long and no longer."""

import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.unmodified.comparisons import ALLOWED, Failed, Row, computed_in
from benchmarks.unmodified.entry import Entry
from stagewise.errors import StagewiseError

SECONDS = 240  # that one process may take; between two, half of it to wait for each other


def row_of(entry: Entry) -> dict[str, str]:
    """The table's row for one model.

    It is made in a process of its own; after it, the two that share the model are forked from this
    one, which has run no backward (autograd's threads outlive no fork). They find the capture on
    disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        here = Path(folder)
        seconds = _wait(_forked(_local, entry, here / "row"))
        row, wanted = _read(here / "row") or (_died(), None)
        row.setdefault("two processes", "-")
        if wanted is not None and entry.processes:
            ranks = [_forked(_rank, entry, here / f"rank{r}", here, r, wanted) for r in range(2)]
            seconds += sum(_wait(child) for child in ranks)
            found = [_read(here / f"rank{rank}") or _died() for rank in range(2)]
            row |= max(found, key=lambda each: (each["result"] != "fine", each["apart"]))
            row["two processes"] = row.pop("apart")
    return {"model": entry.name, **row, "CPU s": f"{seconds:.1f}"}


def _died() -> dict[str, str]:
    return {"result": "raw", "note": f"died, or took over {SECONDS} s", "apart": ""}


def _ended(error: Exception) -> dict[str, str]:
    """How a row ends that is not fine."""
    if isinstance(error, Failed):
        return {"result": "wrong", "note": str(error)}
    result = "refused" if isinstance(error, StagewiseError) else "raw"
    if result == "raw":
        traceback.print_exc()
    return {"result": result, "note": f"{type(error).__name__}: {error}"}


def _forked(run: Callable[..., object], entry: Entry, path: Path, *arguments: object) -> int:
    """A process that puts what `run` gives into a file; its number."""
    child = os.fork()
    if child:
        return child
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        torch.save(run(entry, *arguments), path)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _wait(child: int) -> float:
    """Until it ended; the CPU seconds that it took."""
    usage = os.wait4(child, 0)[2]
    return usage.ru_utime + usage.ru_stime


def _read(path: Path) -> Any:
    return torch.load(path, weights_only=False) if path.exists() else None


def _local(entry: Entry) -> tuple[dict[str, str], object]:
    """The comparisons in one process; and what those in two need."""
    cells: dict[str, str] = {}
    try:
        row = Row(entry)
        cells = row.cells
        row.run()
    except Exception as error:
        return cells | _ended(error), None
    return {**row.cells, "result": "fine"}, row.wanted


def _rank(entry: Entry, folder: Path, rank: int, wanted: tuple[Any, ...]) -> dict[str, str]:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    try:
        apart = Row(entry).in_a_process(*wanted)
        if not apart <= ALLOWED[computed_in(entry)]:
            raise Failed(f"two processes differ by {apart:.1e}")
    except Exception as error:
        return {**_ended(error), "apart": ""}
    return {"result": "fine", "apart": f"{apart:.0e}" if apart else "0"}
