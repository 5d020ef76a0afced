"""Workers of the command line, forked from the harness's server, which has imported torch.

Problem: a worker started as a user's is spends two seconds of CPU on imports before its first line.
Idea: torchelastic's way to start a process takes one from the fork server; session, environment,
working directory, output, signals and exit code are those of a process it has started itself.
"""

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection

import pytest

from tests.harness import CONTEXT

_HANDLED = signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGQUIT  # an exec resets these


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the launcher in this process fork its workers."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    monkeypatch.setattr(
        SubprocessHandler, "_popen", lambda self, args, env: ForkedWorker(args, env)
    )


class ForkedWorker:
    """What torchelastic uses of `subprocess.Popen`."""

    def __init__(self, args: tuple[str, ...], environment: dict[str, str]) -> None:
        assert args[:3] == (sys.executable, "-m", "stagewise"), args
        ready, started = CONTEXT.Pipe(duplex=False)
        streams = [Connection(os.dup(number), readable=False) for number in (1, 2)]
        self._process = CONTEXT.Process(
            target=_stagewise, args=(args[3:], environment, os.getcwd(), streams, started)
        )
        self._process.start()
        for each in (started, *streams):
            each.close()
        ready.poll(None)  # it leads a session, so that it can be killed with its children
        ready.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """As Popen's."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("stagewise", timeout or 0.0)
        return code


def _stagewise(
    words: tuple[str, ...],
    environment: dict[str, str],
    folder: str,
    streams: list[Connection],
    started: Connection,
) -> None:
    os.setsid()
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment)
    # The server is the parent; its death means as much as the launcher's, which is pytest.
    os.environ["STAGEWISE_LAUNCHER"] = str(os.getppid())
    os.chdir(folder)
    sys.argv, tempfile.tempdir = ["stagewise", *words], None
    started.close()
    import torch

    from stagewise.cli.main import main

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    main()
