"""Run a function in K processes that torch.distributed joins, with a time limit."""

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_check.supervise import shortened

RUN_SECONDS = 45.0
GROUP_TIMEOUT = timedelta(seconds=40)
Job = Callable[..., Any]
NOTHING: Mapping[str, str] = {}


class NoResult(Exception):
    """A process gave none: it raised, died or was late."""


def run_ranks(
    size: int, job: Job, *arguments: object, environment: Mapping[str, str] = NOTHING
) -> list[Any]:
    """Return what `job(*arguments)` returned in each process; NoResult if one did not."""
    deadline = time.monotonic() + RUN_SECONDS
    links, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            place = rank, size, Path(folder, "store")
            process = multiprocessing.Process(
                target=_serve, args=(theirs, place, environment, job, arguments)
            )
            process.start()
            theirs.close()
            links.append(ours)
            processes.append(process)
        try:
            return _collect(links, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(links: Sequence[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(links):
        waiting = {link: rank for rank, link in enumerate(links) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise NoResult(f"ranks {sorted(waiting.values())} of {len(links)} did not end in time")
        for link in ready:
            assert isinstance(link, Connection)
            try:
                # Plain bytes: torch would send tensors as handles that end with their process.
                result = pickle.loads(link.recv_bytes())
            except EOFError:
                raise NoResult(f"rank {waiting[link]} died") from None
            if isinstance(result, NoResult):
                raise result
            results[waiting[link]] = result
    return [results[rank] for rank in range(len(links))]


def _serve(
    link: Connection,
    place: tuple[int, int, Path],
    environment: Mapping[str, str],
    job: Job,
    arguments: tuple[object, ...],
) -> None:
    rank, size, store = place
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        if size > 1:
            _join(rank, size, store)
        link.send_bytes(pickle.dumps(job(*arguments)))
    except BaseException as error:
        words = f"rank {rank}: {type(error).__name__}: {shortened(error)}"
        link.send_bytes(pickle.dumps(NoResult(words)))


def _join(rank: int, size: int, store: Path) -> None:
    if torch.accelerator.is_available():
        index = rank % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        os.environ["LOCAL_RANK"] = str(index)
    dist.init_process_group(
        init_method=f"file://{store}", rank=rank, world_size=size, timeout=GROUP_TIMEOUT
    )
