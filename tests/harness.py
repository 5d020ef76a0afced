"""Worker pools: run a function on K real processes over gloo, with a hard time limit.

Starting a process costs an `import torch`, so a pool stays alive for the session and runs many
cases; its process group stays too. A case is a module-level function `case(*args)` that every
rank calls; what each returns (or raises: with the rank's traceback) comes back by rank.

Invariant: no worker outlives pytest. A pool is killed on a time-out, on a failure (its ranks no
longer agree) and at the end; a worker whose parent dies is killed by the kernel.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
ROOT = Path(__file__).parents[1]
_PR_SET_PDEATHSIG = 1


def ensure_server() -> None:
    """Have the fork server run; it starts where it can import `tests.preloaded`."""
    with contextlib.chdir(ROOT):
        multiprocessing.forkserver.ensure_running()


class WorkerError(Exception):
    """A case raised on some rank; the message holds every rank's traceback."""


class WorkerTimeout(Exception):
    """A case did not end in time; the message names the ranks that hung."""


@dataclass(frozen=True)
class Raised:
    """How a case ended on one rank, where it raised."""

    error: str  # "TypeName: message"
    text: str  # the traceback
    seconds: float  # from the start of the case


class Pool:
    """K processes that share one process group, with NCCL each on a GPU of its own.

    `timeout` is the group's, in seconds; None for torch's.
    """

    def __init__(self, num_ranks: int, backend: str = "gloo", timeout: float | None = None) -> None:
        ensure_server()
        self.num_ranks = num_ranks
        self._directory = tempfile.TemporaryDirectory(prefix="stagewise-ranks-")
        store = Path(self._directory.name) / "store"
        self._links: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve,
                args=(rank, num_ranks, str(store), theirs, backend, timeout),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(process)
        self.alive = True

    def run(self, case: Callable[..., Any], *args: object, seconds: float = 60) -> list[Any]:
        """Every rank's result; raises WorkerError or WorkerTimeout and kills the pool."""
        results = self.outcomes(case, *args, seconds=seconds)
        raised = {rank: r for rank, r in enumerate(results) if isinstance(r, Raised)}
        if raised:
            raise WorkerError("\n".join(f"rank {r}:\n{it.text}" for r, it in raised.items()))
        return results

    def outcomes(self, case: Callable[..., Any], *args: object, seconds: float = 60) -> list[Any]:
        """As `run`, but gives Raised for a rank whose case raised; then the pool is killed."""
        deadline = time.monotonic() + seconds
        for link in self._links:
            link.send((case, args))
        outcomes: dict[int, Any] = {}
        while len(outcomes) < self.num_ranks:
            waiting = {self._links[r]: r for r in range(self.num_ranks) if r not in outcomes}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise WorkerTimeout(
                    f"ranks {sorted(waiting.values())} of {self.num_ranks} still ran "
                    f"{case.__name__} after {seconds} s; others: {outcomes}"
                )
            for link in ready:
                assert isinstance(link, Connection)
                try:
                    outcomes[waiting[link]] = link.recv()
                except EOFError:
                    outcomes[waiting[link]] = Raised("died", "the process died", 0.0)
        if any(isinstance(outcome, Raised) for outcome in outcomes.values()):
            self.kill()
        return [outcomes[rank] for rank in range(self.num_ranks)]

    def kill(self) -> None:
        """End every worker now."""
        self.alive = False
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for link in self._links:
            link.close()
        self._directory.cleanup()


class Pools:
    """One living pool per number of ranks, started when first asked for."""

    def __init__(self, backend: str = "gloo") -> None:
        self._pools: dict[int, Pool] = {}
        self._backend = backend

    def __getitem__(self, num_ranks: int) -> Pool:
        pool = self._pools.get(num_ranks)
        if pool is None or not pool.alive:
            pool = self._pools[num_ranks] = Pool(num_ranks, self._backend)
        return pool

    def kill(self) -> None:
        """End every worker of every pool."""
        for pool in self._pools.values():
            if pool.alive:
                pool.kill()


def _serve(
    rank: int, num_ranks: int, store: str, link: Connection, backend: str, timeout: float | None
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, which ends us
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=None if timeout is None else timedelta(seconds=timeout),
    )
    while True:
        try:
            case, args = link.recv()
        except EOFError:
            return
        start = time.monotonic()
        try:
            result = case(*args)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            result = Raised(text, traceback.format_exc(), time.monotonic() - start)
        link.send(result)
        if isinstance(result, Raised):
            # As in a script: the error ends this process, which is how its peers notice.
            link.close()
            os._exit(1)
