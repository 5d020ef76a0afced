"""Start a command whose processes can all be found again, by a mark in their environment."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MARK = "CHAOS_TRIAL"
_PAUSE = 0.02
_GONE_SECONDS = 10.0  # after the command itself has ended


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None  # None: it was still running when its time was over
    text: str  # everything that it and its workers wrote
    gone_at: float  # the time when its last process had ended
    left: int  # processes that were still there, and were killed


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> Ended:
    """Run `command` in `folder` for at most so many seconds."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    root = str(Path(__file__).parents[2])
    own = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        **environment,
        _MARK: mark,
    }
    until = time.monotonic() + seconds
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    text: list[bytes] = []  # through a pipe: a limit on files' sizes would cut it off
    assert process.stdout is not None
    reader = threading.Thread(target=lambda pipe: text.append(pipe.read()), args=[process.stdout])
    reader.start()
    code = _wait(process, until)
    if code is not None:
        until = min(until, time.monotonic() + _GONE_SECONDS)
        while _marked(mark) and time.monotonic() < until:
            time.sleep(_PAUSE)
    gone_at, left = time.time(), _marked(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    reader.join()
    return Ended(code, b"".join(text).decode(errors="replace"), gone_at, len(left))


def _wait(process: "subprocess.Popen[bytes]", until: float) -> int | None:
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _marked(mark: str) -> list[int]:
    """Return the running processes that have the mark in their environment."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is not ours
            pass
    return found
