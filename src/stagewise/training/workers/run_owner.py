"""Only one run may write to a folder: the one that holds its lock.

Problem: two runs with the same `--out` remove each other's unfinished checkpoints. Idea: rank 0
holds an advisory lock on a file in the folder; the operating system releases it however it ends.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from stagewise.errors import UsageError

LOCK = ".lock"


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """Lock the folder `run`; raise UsageError on every rank if another run holds it."""
    together = dist.is_initialized() and dist.get_world_size() > 1
    refusal: list[str | None] = [None]
    handle: int | None = None
    if not together or dist.get_rank() == 0:
        try:
            handle = _locked(run)
        except UsageError as error:
            refusal = [str(error)]
    if together:
        dist.broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise UsageError(refusal[0])
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(run: Path) -> int | None:
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
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise UsageError(
            f"{run} is in use by another run ({holder}); give another --out, or wait for it to end"
        ) from None
    except OSError:  # a file system without locks
        return handle
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle
