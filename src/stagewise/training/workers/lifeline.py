"""A worker ends with the process that started it.

Problem: a launcher that is killed cannot end its workers, and one that hangs in a step never looks.
Idea: a thread looks whether the parent lives. After its death the main thread may still end between
two steps, with a checkpoint; without progress the process is ended. A thread needs Python's lock,
which C code may hold, so on Linux the kernel also signals the death (prctl(2), PR_SET_PDEATHSIG);
the signal's handler is libc's own `alarm`, and the alarm ends the process.
"""

import ctypes
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from threading import Thread

from stagewise.engine.watch.now import NOW
from stagewise.training.workers.environment import FAILURE_EXIT_CODE, LAUNCHER, STOP_FILE

LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 5.0  # without an instruction's progress, after the parent's death
STOPPING_SECONDS = 60.0  # to write a checkpoint, once the main thread has seen the death
# Its number, 16, is also the seconds that `alarm` waits; nothing sends it.
DEATH_SIGNAL = getattr(signal, "SIGSTKFLT", None)
_PR_SET_PDEATHSIG = 1


class Lifeline:
    """Watches this process's parent; `folder` is the launcher's, which it can no longer remove."""

    def __init__(self, parent: int, folder: Path | None = None) -> None:
        self._parent, self._folder = parent, folder
        self._is_heeded = False
        _have_death_signalled()
        Thread(target=self._watch, name="stagewise lifeline", daemon=True).start()

    @property
    def is_cut(self) -> bool:
        """Whether the parent has died; the caller ends this process soon if so."""
        self._is_heeded = self._is_cut()
        return self._is_heeded

    def tidy(self) -> None:
        """Remove the launcher's folder if the launcher cannot."""
        if self._folder is not None and self._is_cut():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _is_cut(self) -> bool:
        return os.getppid() != self._parent

    def _watch(self) -> None:
        while not self._is_cut():
            time.sleep(LOOK_SECONDS)
        state, since = NOW.state(), time.monotonic()
        while time.monotonic() - since < self._patience():
            if DEATH_SIGNAL is not None:
                signal.alarm(DEATH_SIGNAL)  # from now on
            time.sleep(min(LOOK_SECONDS, PATIENCE_SECONDS / 4))
            if (now := NOW.state()) != state:
                state, since = now, time.monotonic()
        self.tidy()
        os._exit(FAILURE_EXIT_CODE)

    def _patience(self) -> float:
        return STOPPING_SECONDS if self._is_heeded else PATIENCE_SECONDS


def lifeline_here() -> Lifeline:
    """Return this worker's; our launcher has told its process, torchrun has not."""
    stop_file = os.environ.get(STOP_FILE)
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    return Lifeline(parent, Path(stop_file).parent if stop_file else None)


def _have_death_signalled() -> None:
    """Have the kernel end this process some seconds after its parent's death."""
    if DEATH_SIGNAL is None or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    handler = libc.signal
    handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
    handler(DEATH_SIGNAL, ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(_PR_SET_PDEATHSIG, DEATH_SIGNAL)
