"""Running a command's body once per device: in this process, in our workers, or torchrun's."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stagewise.errors import UsageError
from stagewise.training.workers.environment import (
    INTERRUPTED_EXIT_CODE,
    STOP_FILE,
    launched,
    launched_by_us,
    stopped_file,
    world_size,
)


@contextmanager
def errors_told_once() -> Iterator[None]:
    """In a worker, let an error be reported once for all workers; elsewhere let it through."""
    if not launched():
        yield
        return
    from stagewise.training.workers.worker import failure_told

    with failure_told():
        yield


def run_in_workers(
    num_workers: int,
    arguments: list[str],
    *,
    before: Callable[[], None],
    body: Callable[[], None],
) -> None:
    """Run `body` in each of `num_workers` workers.

    In a worker that is already running, join the others and run it. Otherwise start the workers,
    if `before` finds nothing wrong, with the command line `arguments`, which leads them here; a
    single one needs no process.
    """
    if launched():
        if world_size() != num_workers:
            raise UsageError(
                f"torchrun has started {world_size()} workers but the schedule is for "
                f"{num_workers} devices, and each needs one: give --devices {world_size()}, or "
                f"torchrun --nproc-per-node {num_workers}"
            )
        from stagewise.training.workers.worker import joined

        with joined():
            body()
    elif num_workers == 1:
        body()
    else:
        before()
        from stagewise.training.workers.launch import launch

        try:
            if launch(num_workers, arguments):
                raise SystemExit(INTERRUPTED_EXIT_CODE)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED_EXIT_CODE) from None


def end_stopped() -> None:
    """End a run that was stopped before its last step, so that whoever waits for it can tell.

    Our own parent is told by a file, since a worker that fails ends the others.
    """
    if launched_by_us():
        Path(stopped_file(os.environ[STOP_FILE])).touch()
    elif os.environ.get("RANK", "0") == "0":
        raise SystemExit(INTERRUPTED_EXIT_CODE)
