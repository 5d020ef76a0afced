"""Which of several workers' failures is the cause, and what it was.

Problem: when a worker fails, the others fail of it, or are ended; torchelastic reports the earliest
by whole seconds. Idea: what only reports another's failure comes last.
"""

import signal
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.engine.watch.watchdog import HANGS_EXIT_CODE
from stagewise.errors import (
    CheckpointError,
    PeerError,
    RecipeError,
    StagewiseError,
    UsageError,
)
from stagewise.training.workers.environment import USAGE_EXIT_CODE

_CAUSED = "\nThe above exception was the direct cause"  # between Python's chained tracebacks
_CONNECTION_LOST = "gloo/transport"  # in gloo's message when another rank has died


def first_cause(failures: Mapping[int, ProcessFailure], kills: MemoryKills) -> StagewiseError:
    """Return the error to report: the earliest one that is not a consequence of another rank's.

    `kills` counts from the workers' start.
    """

    def importance(rank: int) -> tuple[bool, bool, int, int]:
        failure, text = failures[rank], _text(failures[rank], kills)
        only_reports = text.startswith(PeerError.__name__) or _CONNECTION_LOST in text
        was_ended = failure.exitcode in (-signal.SIGTERM, HANGS_EXIT_CODE)  # as others had failed
        return was_ended, only_reports, failure.timestamp, rank

    rank = min(failures, key=importance)
    failure = failures[rank]
    text, root = _text(failure, kills), _root(failure)
    if failure.exitcode == USAGE_EXIT_CODE:
        kind, _, words = text.partition(": ")
        return UsageError(words + (root if kind == RecipeError.__name__ else ""))
    if failure.exitcode < 0:  # it could not say where it was
        others = [_text(failures[other], kills) for other in sorted(failures) if other != rank]
        seen = [said for said in others if said.startswith(PeerError.__name__)]
        text += f"\n{seen[0].partition(': ')[2]}" if seen else ""
    return PeerError(f"the worker of rank {rank} failed: {text}{root}")


def would_come_again(failures: Mapping[int, ProcessFailure], kills: MemoryKills) -> bool:
    """Return whether workers that are started again would fail alike: by the user's mistake.

    A checkpoint that could not be read or written is none: the disk may have room again, and the
    one before may be whole. Nor is what happens when a worker is killed.
    """
    if any(each.exitcode < 0 and each.exitcode != -signal.SIGTERM for each in failures.values()):
        return False
    return any(
        failure.exitcode == USAGE_EXIT_CODE
        and not _text(failure, kills).startswith(CheckpointError.__name__)
        for failure in failures.values()
    )


def _text(failure: ProcessFailure, kills: MemoryKills) -> str:
    """Return "Type: message" as the worker wrote it, or how it died."""
    # torch types `message` as str, but it is the dictionary that the worker's handler wrote.
    message: object = failure.message
    if isinstance(message, dict):
        return str(message["message"])
    if failure.exitcode == -signal.SIGKILL:
        return f"{message}: {kills.in_words()}"
    if failure.exitcode < 0:
        return str(message)
    return f"exit code {failure.exitcode}, without a message"


def _root(failure: ProcessFailure) -> str:
    """Return the traceback of the root cause; none of a mistake, or of ours while waiting."""
    message: object = failure.message
    if not isinstance(message, dict) or str(message["message"]).startswith(PeerError.__name__):
        return ""
    stack = str(message["extraInfo"].get("py_callstack", ""))
    if not stack or (failure.exitcode == USAGE_EXIT_CODE and _CAUSED not in stack):
        return ""
    return "\n\n" + stack.split(_CAUSED)[0].rstrip()
