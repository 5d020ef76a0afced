"""Errors while a checkpoint is written or read, in words: the cause, what is left, what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from stagewise.engine.watch.now import NOW
from stagewise.errors import CheckpointError
from stagewise.training.run_folder import Checkpoint, whole


@contextmanager
def explain_write_errors(unfinished: Path, run: Path) -> Iterator[None]:
    """Turn errors while writing into a CheckpointError that names the cause."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        kept = whole(run)
        last = f"{kept[-1].name} is untouched" if kept else "there is no earlier one"
        raise CheckpointError(
            f"the checkpoint {unfinished.with_suffix('')} cannot be written{_by(error)}: "
            f"{_cause(error, unfinished)}; {last}. Free some space, or give another --out, and "
            "continue with --resume"
        ) from error


def _by(error: BaseException) -> str:
    """Name the ranks that could not write: on several hosts each has a disk of its own."""
    ranks = ", ".join(map(str, sorted(getattr(error, "failures", {}))))
    by = f"rank {ranks}" if ranks else NOW.place
    return f" by {by}" if by else ""


def _cause(error: BaseException, where: Path | None = None) -> str:
    """Return the operating system's message, wherever it is in the error that torch raises.

    Without one, the first error's, and how full the disk of `where` is, if given.
    """
    failures = getattr(error, "failures", {})
    chain = [error, *(each[0] for each in failures.values())]
    seen: list[BaseException] = []
    while chain:
        each = chain.pop(0)
        if each not in seen:
            seen.append(each)
            chain += [e for e in (each.__cause__, each.__context__) if e is not None]
    for each in seen:
        if isinstance(each, OSError) and each.errno is not None:
            name = errno.errorcode.get(each.errno, "")
            return f"{each.strerror} ({name})"
    lines = str(seen[-1]).strip().splitlines()
    text = f"{type(seen[-1]).__name__}: {lines[0]}" if lines else type(seen[-1]).__name__
    if where is None:
        return text
    folder = next((each for each in (where, *where.parents) if each.exists()), where)
    return f"{text} ({shutil.disk_usage(folder).free} bytes are free on the disk)"


@contextmanager
def explain_read_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn errors while reading into a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        if str(checkpoint.path) in str(error):
            raise
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} cannot be read: {error}"
        ) from error
    except (Exception, CheckpointException) as error:  # a broken file may raise anything
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} cannot be read: {_cause(error)}; "
            "if it is damaged, use another one from the same directory"
        ) from error
