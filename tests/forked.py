"""The command line and its workers, forked from the harness's server, which has imported torch.

Problem: a process started as a user's is spends four seconds of CPU on imports before its first
line. Idea: it comes from the fork server, and torchelastic's way to start a worker takes one from
there, too; session, environment, directory, output, signals and exit code are those of a process
that was started. Whoever starts one has it end with it.
"""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.harness import CONTEXT, ensure_server

_HANDLED = signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGQUIT  # an exec resets these


class Forked:
    """`python -m MODULE WORDS`; has what `Command` and torchelastic use of `subprocess.Popen`.

    Its output goes to the file descriptors `out` and `err`, or through pipes to `stdout` and
    `stderr`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        streams: Sequence[int] | None = None,
    ) -> None:
        ensure_server()
        pipes = [] if streams else [os.pipe() for _ in range(2)]
        ours = [os.fdopen(fd) for fd, _ in pipes]
        self.stdout, self.stderr = ours or [None, None]
        theirs = [Connection(fd, readable=False) for _, fd in pipes]
        theirs += [Connection(os.dup(fd), readable=False) for fd in streams or ()]
        ready, started = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(
            target=_run, args=([*arguments], {**environment}, folder, theirs, started)
        )
        self._process.start()
        for each in (started, *theirs):
            each.close()
        ready.poll(None)  # it leads a session, so that it can be killed with its children
        ready.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired("python", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of its output; it is killed when time is up."""
        assert self.stdout is not None and self.stderr is not None
        late = threading.Timer(timeout or 0, os.kill, (self.pid, signal.SIGKILL))
        late.start() if timeout else None
        texts = {}
        reader = threading.Thread(
            target=lambda file: texts.update(err=file.read()), args=[self.stderr]
        )
        reader.start()
        out = self.stdout.read()
        reader.join()
        late.cancel()
        self.wait(timeout)
        self.stdout.close()
        self.stderr.close()
        return out, texts["err"]


def fork_workers(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Have the launcher in this process fork its workers."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def forked(_: SubprocessHandler, args: tuple[str, ...], environment: dict[str, str]) -> Forked:
        assert args[0] == sys.executable
        return Forked([word for word in args[1:] if word != "-u"], environment, Path.cwd(), (1, 2))

    (monkeypatch or pytest.MonkeyPatch()).setattr(SubprocessHandler, "_popen", forked)


def _run(
    arguments: list[str],
    environment: dict[str, str],
    folder: Path,
    streams: list[Connection],
    started: Connection,
) -> None:
    """What `python ARGUMENTS` does."""
    os.setsid()
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment)
    if "STAGEWISE_LAUNCHER" in environment:  # who must live: the server in its place
        os.environ["STAGEWISE_LAUNCHER"] = str(os.getppid())
    os.chdir(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    started.close()
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    fork_workers()
    option, module, *words = arguments
    assert option == "-m"
    tempfile.tempdir, sys.argv = None, [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """The launcher's death is not the server's, which is the parent that the kernel knows."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
