"""The command line with its launcher and workers, forked from a process that has imported all.

Problem: of a trial's thirteen seconds on two cores, nine are imports of torch in three to five
processes. Idea: a fork server runs the launcher, and torchelastic's way to start a worker forks in
place of an exec; sessions, signals, environment and parents are those of real processes.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from benchmarks.chaos.forked import CONTEXT
from benchmarks.chaos.processes import Ended

_LIMIT_SECONDS, _GONE_SECONDS = 150.0, 10.0
_HANDLED = signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGQUIT  # an exec resets these


def launched(
    words: list[str], num_ranks: int, folder: Path, environment: Mapping[str, str]
) -> Ended:
    """Run `stagewise WORDS`, which starts its workers, and wait for the last process."""
    output, writing = CONTEXT.Pipe(duplex=False)  # each process of the trial has its other end
    launcher = CONTEXT.Process(target=_launcher, args=(words, folder, dict(environment), writing))
    launcher.start()
    writing.close()
    text, gone = list[bytes](), list[float]()

    def read() -> None:
        while part := os.read(output.fileno(), 1 << 16):
            text.append(part)
        gone.append(time.time())

    reader = threading.Thread(target=read)
    reader.start()
    launcher.join(_LIMIT_SECONDS)
    code = launcher.exitcode
    reader.join(0 if code is None else _GONE_SECONDS)
    gone.append(time.time())
    left = _writing_to(output) if reader.is_alive() else []
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    reader.join()
    launcher.join()
    output.close()
    return Ended(code, b"".join(text).decode(errors="replace"), gone[0], len(left))


def _writing_to(output: Connection) -> list[int]:
    """Return the processes that have the other end of the pipe open."""
    name, found = f"pipe:[{os.fstat(output.fileno()).st_ino}]", list[int]()
    for path in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # it has ended, or is not ours
            if any(os.readlink(each) == name for each in path.iterdir()):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def _launcher(
    words: list[str], folder: Path, environment: dict[str, str], output: Connection
) -> None:
    """What `python -m stagewise WORDS` does."""
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.chdir(folder)
    SubprocessHandler._popen = lambda self, args, env: _Forked(args, env)  # type: ignore[method-assign, assignment]
    _run_command(words)


class _Forked(subprocess.Popen):  # type: ignore[type-arg]
    """A worker, forked in place of started."""

    def __init__(self, args: tuple[str, ...], environment: dict[str, str]) -> None:
        self.args, self.returncode = args, None  # type: ignore[assignment]
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock, self._child_created = threading.Lock(), True
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for number in _HANDLED:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(environment)
            _run_command(list(args[3:]))  # after `python -m stagewise`


def _run_command(words: list[str]) -> None:
    """Run it in this process, and end the process as Python would."""
    from stagewise.cli.main import main

    tempfile.tempdir, code = None, 1
    sys.argv = ["stagewise", *words]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
