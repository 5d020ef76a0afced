"""Start one worker process per device on this machine, through torch's elastic launch API.

Problem: torchelastic's handling of signals, timeouts and output suits a cluster; at a terminal,
Ctrl-C should end the run cleanly, and a failure should be reported once.
Idea: we handle signals ourselves (workers see a touched file between steps, `stop.py`), silence
torchelastic's loggers, and find the first cause of a failure in the workers' error files.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.training.workers.environment import (
    LAUNCHER,
    STOP_FILE,
    exit_code_file,
    num_cores,
)
from stagewise.training.workers.failures import first_cause, would_come_again
from stagewise.training.workers.kept_states import KEPT_STATES, memory_for
from stagewise.training.workers.lost import held_back
from stagewise.training.workers.stop import SIGNALS

PATIENCE_SECONDS = 25  # of the 30 that a cluster usually waits between SIGTERM and SIGKILL
# For workers to end after one has failed, before they are killed, if one is stopped (SIGSTOP): it
# does not end by itself, and no checkpoint that it belongs to can be completed.
ENDING_SECONDS = 8
_HANGUP, _ALARM = getattr(signal, "SIGHUP", None), getattr(signal, "SIGALRM", None)  # not Windows
_KEEP_BYTES = str(1 << 40)  # more than any machine has


def launch(num_workers: int, arguments: list[str], restarts: int = 0) -> int:
    """Run `stagewise ARGUMENTS` in `num_workers` worker processes and wait for them.

    Returns the exit code that they ask for, such as INTERRUPTED_EXIT_CODE for a run that was
    stopped before its last step, or 0. The first signal lets them finish their step; a second, or
    the end of patience after one that no terminal's user has sent, kills them and raises
    KeyboardInterrupt. Raises UsageError with a worker's message for the user's mistake, PeerError
    with a worker's traceback for other failures.
    """
    _silence_torchelastic()
    with TemporaryDirectory(prefix="stagewise-") as directory:
        stop_file = Path(directory, "stop")
        config = launch_config(num_workers, directory, signals="SIGQUIT", restarts=restarts)
        environment = {
            STOP_FILE: str(stop_file),
            LAUNCHER: str(os.getpid()),
            **worker_environment(num_workers),
        }
        entrypoint, kills = elastic_launch(config, sys.executable), MemoryKills()
        held, ends = held_back(stop_file, kills), failures_end(kills)
        try:
            with memory_for(num_workers, Path(directory)) as kept:
                told = _environment({**environment, KEPT_STATES: kept})
                with told, _signals_touch(stop_file), held, ends:
                    entrypoint("-m", "stagewise", *arguments)
        except ChildFailedError as error:
            raise first_cause(error.failures, kills) from None
        except SignalException:
            raise KeyboardInterrupt from None
        code = Path(exit_code_file(str(stop_file)))
        return int(code.read_text()) if code.exists() else 0


def launch_config(
    num_workers: int, log_directory: str, *, signals: str, restarts: int = 0
) -> LaunchConfig:
    """Configure one node with `num_workers` processes; torchelastic handles the `signals`."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        logs_specs=DefaultLogsSpecs(log_dir=log_directory),
        signals_to_handle=signals,
    )


@contextmanager
def failures_end(kills: MemoryKills) -> Iterator[None]:
    """Inside, torchelastic does not wait long for a stopped worker to end after another has failed,
    and starts none again that would only fail alike.
    """
    plain = LocalElasticAgent._monitor_workers

    def monitor(agent: LocalElasticAgent, group: WorkerGroup) -> RunResult:
        if (context := agent._pcontext) is not None:
            vars(context).setdefault("close", partial(_close_soon, context))
        result: RunResult = plain(agent, group)
        if would_come_again(result.failures, kills):
            agent._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = monitor  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalElasticAgent._monitor_workers = plain  # type: ignore[method-assign]


def _close_soon(
    context: PContext, death_sig: signal.Signals | None = None, timeout: int = 30
) -> None:
    if any(map(_is_stopped, context.pids().values())):
        timeout = min(timeout, ENDING_SECONDS)
    PContext.close(context, death_sig, timeout)


def _is_stopped(process: int) -> bool:
    """Return whether a process waits for SIGCONT; False where /proc does not tell."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def worker_environment(num_workers: int) -> dict[str, str]:
    """Return environment variables for the workers, unless the user has set them.

    Workers share the cores. glibc keeps freed memory: by default it returns memory within every
    step, and the next step would fault the pages in again.
    """
    wanted = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // num_workers)),
        "MALLOC_TRIM_THRESHOLD_": _KEEP_BYTES,
        "MALLOC_MMAP_THRESHOLD_": _KEEP_BYTES,
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def _signals_touch(stop_file: Path) -> Iterator[None]:
    """The first signal touches `stop_file`; the second makes torchelastic kill the workers.

    So does the end of PATIENCE_SECONDS after the first, but for Ctrl-C, which can be repeated.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            raise SignalException("stopped at once", sigval=signal.SIGKILL)
        stop_file.touch()
        if number != signal.SIGINT and _ALARM is not None:
            signal.alarm(PATIENCE_SECONDS)
        with suppress(OSError):  # a closed terminal
            print("\nstopping after this step; repeat to stop at once", file=sys.stderr, flush=True)

    handled = [*SIGNALS, *(each for each in (_HANGUP, _ALARM) if each is not None)]
    before = {number: signal.signal(number, on_signal) for number in handled}
    try:
        yield
    finally:
        if _ALARM is not None:
            signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which workers inherit, and restore the old ones."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _silence_torchelastic() -> None:
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
