"""Only one run may write to a folder: the one that holds its lock.

Problem: two runs with the same `--out` remove each other's unfinished checkpoints. Idea: rank 0
holds an advisory lock on a file in the folder; the operating system releases it however it ends.
The file also names the agents that have started the run's workers.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stagewise.engine.transport.connect import values_of_all
from stagewise.engine.transport.processes import is_first
from stagewise.errors import UsageError

LOCK = ".lock"
_PATIENCE_SECONDS, _POLL_SECONDS = 10.0, 0.1


@contextmanager
def owned(run: Path, agents: Sequence[str] = ()) -> Iterator[None]:
    """Lock the folder `run` for the launch of `agents`; UsageError on every rank if it is taken."""
    refusal: str | None = None
    handle: int | None = None
    if is_first():
        try:
            handle = _locked(run, agents)
        except UsageError as error:
            refusal = str(error)
    refusal = values_of_all(refusal, "the lock of the run's folder")[0]
    if refusal is not None:
        raise UsageError(refusal)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(run: Path, agents: Sequence[str]) -> int | None:
    """Return the open lock file; None if the system has no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(
            f"the run's folder {run} cannot be written: {error.strerror}; give another --out"
        ) from error
    try:
        _await_own(run, agents, lambda: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        holder = next(iter(_lines(run)), "another process")
        os.close(handle)
        raise UsageError(
            f"{run} is in use by another run ({holder}); give another --out, or wait for it to end"
        ) from None
    except OSError:  # a file system without locks
        return handle
    os.ftruncate(handle, 0)
    lines = [f"process {os.getpid()} on {socket.gethostname()}", *agents]
    os.write(handle, "\n".join(lines).encode())
    return handle


def _await_own(run: Path, agents: Sequence[str], lock: Callable[[], None]) -> None:
    """Lock; if an earlier start of this launch holds the lock, wait a while for its end."""
    ends = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return lock()
        except BlockingIOError:
            if time.monotonic() > ends or not {*agents} & {*agents_of(run)}:
                raise
        time.sleep(_POLL_SECONDS)


def agents_of(run: Path) -> list[str]:
    """Return the agents that have started the workers of the last run in this folder."""
    return _lines(run)[1:]


def _lines(run: Path) -> list[str]:
    try:
        return (run / LOCK).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
