"""Stop requests: Ctrl-C, a kill, or the launcher's death, handled between two steps.

Problem: a signal in the middle of a step leaves other workers waiting and loses the run.
Idea: a signal only sets a flag; the loop checks it between steps, all ranks agree, write a
checkpoint and end. Workers run in their own sessions, which the terminal's Ctrl-C does not reach,
so the launcher touches a file that they watch. A second Ctrl-C ends at once. Other signals may come
twice, since Slurm sends one to all processes of a job, and torchrun passes its own on; who cannot
wait kills (SIGKILL). The launcher's death (`lifeline`) is a request too.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType

from stagewise.training.workers.environment import STOP_FILE
from stagewise.training.workers.lifeline import Lifeline

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_REQUEST_SECONDS = 1.0  # within which a terminal's Ctrl-C also comes through torchrun


class StopRequest:
    """Whether this process should end after the current step."""

    def __init__(self, *, stop_file: Path | None = None, lifeline: Lifeline | None = None) -> None:
        self._stop_file, self._lifeline = stop_file, lifeline
        self._signalled: float | None = None  # when, by time.monotonic

    @property
    def made(self) -> bool:
        """Whether there was a signal, a touch of the stop file, or the launcher died."""
        if self._signalled is not None or (self._lifeline is not None and self._lifeline.is_cut):
            return True
        return self._stop_file is not None and self._stop_file.exists()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM; a second SIGINT has its usual effect."""
        if current_thread() is not main_thread():  # Python allows signal handlers only there
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def on_signal(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._signalled is None:
                self._signalled = now
            elif number == signal.SIGINT and now - self._signalled >= _ONE_REQUEST_SECONDS:
                restore()
                signal.raise_signal(number)

        for number in SIGNALS:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            restore()


def stop_request(lifeline: Lifeline | None) -> StopRequest:
    """Return the request that this process watches; a worker's launcher makes it by a file."""
    name = os.environ.get(STOP_FILE)
    return StopRequest(stop_file=Path(name) if name else None, lifeline=lifeline)
