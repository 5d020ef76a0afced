"""Running a command's body once per device: in this process, in our workers, or torchrun's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stagewise.errors import UsageError
from stagewise.training.workers.environment import INTERRUPTED_EXIT_CODE, launched, world_size


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
            launch(num_workers, arguments)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED_EXIT_CODE) from None
