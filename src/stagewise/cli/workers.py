"""Run a command's body once per device: in this process, in our workers, or in torchrun's."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stagewise.cli.typed import NumDevices, device_names_of
from stagewise.errors import UsageError
from stagewise.training.workers.environment import (
    INTERRUPTED_EXIT_CODE,
    STOP_FILE,
    exit_code_file,
    launched,
    launched_by_us,
    world_size,
)

if TYPE_CHECKING:
    from stagewise.training.workers.lifeline import Lifeline


@contextmanager
def report_errors_once() -> Iterator["Lifeline | None"]:
    """In a worker, report an error once for all workers; elsewhere, let it through.

    A worker ends with its launcher from here on.
    """
    if not launched():
        yield None
        return
    from stagewise.training.workers.lifeline import lifeline_here

    lifeline = lifeline_here()
    from stagewise.training.workers.worker import report_failure_once

    with report_failure_once(lifeline):
        yield lifeline
    lifeline.tidy()


def run_in_workers(
    num_workers: int,  # perhaps NumDevices
    arguments: list[str],
    *,
    before: Callable[[], None],
    body: Callable[[], None],
    timeout: float | None = None,
    restarts: int = 0,
    may_share: bool = True,
) -> None:
    """Run `body` in each of `num_workers` workers.

    A worker joins the others and runs it. Otherwise `before` checks the request, and workers are
    started with the command line `arguments`, which leads them here; a single one runs in this
    process, and so do several that would have to share accelerators, if they `may_share` one.
    `timeout` is how many seconds workers wait for each other, None for torch's. When one fails, all
    are started again, up to `restarts` times.
    """
    if launched():
        if world_size() != num_workers:
            raise UsageError(
                f"torchrun has started {world_size()} workers, but the schedule needs one for each "
                f"of {num_workers} devices: give --devices {world_size()}, or "
                f"torchrun --nproc-per-node {num_workers}"
            )
        from stagewise.training.workers.anew import run_joined

        run_joined(timeout, body)
    elif not may_share and _share_accelerators(num_workers):
        raise UsageError(
            f"the mesh needs {num_workers} devices, each with a process of its own, but this "
            "machine has fewer accelerators; make the mesh smaller, or start it with torchrun"
        )
    elif num_workers == 1 or _share_accelerators(num_workers):
        before() if device_names_of(num_workers) else None  # are they here?
        _say_where(num_workers)
        body()
    else:
        before()
        from stagewise.training.workers.launch import launch

        try:
            if code := launch(num_workers, arguments, restarts):
                raise SystemExit(code)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED_EXIT_CODE) from None


def _share_accelerators(num_workers: int) -> bool:
    if isinstance(num_workers, NumDevices) and num_workers.names:
        return num_workers.share_a_process
    from stagewise.engine.transport.processes import accelerators

    return 0 < len(accelerators()) < num_workers


def _say_where(num_devices: int) -> None:
    """Say on which accelerators this process runs the plan's devices; nothing without any."""
    from stagewise.engine.transport.processes import devices_here

    if devices := device_names_of(num_devices) or devices_here(num_devices):
        where = ", ".join(f"{number} on {device}" for number, device in enumerate(devices))
        print(f"one process runs all devices of the plan: {where}", file=sys.stderr)


def end_with(code: int) -> None:
    """Have the whole command end with this exit code, once the workers have ended without failure.

    Our own launcher is told in a file, because a worker that fails would end the others.
    """
    if launched_by_us():
        with suppress(FileNotFoundError):  # the launcher has died, and so has its folder
            Path(exit_code_file(os.environ[STOP_FILE])).write_text(str(code))
    elif os.environ.get("RANK", "0") == "0":
        raise SystemExit(code)
