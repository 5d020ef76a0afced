"""A worker process: join the others, and report a failure once."""

import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from stagewise.engine.transport.connect import disconnect, leave
from stagewise.engine.transport.processes import accelerators
from stagewise.engine.watch.last_words import last_words
from stagewise.errors import CheckpointError, PeerError, UsageError
from stagewise.training.workers.elastic import num_restarts
from stagewise.training.workers.environment import (
    FAILURE_EXIT_CODE,
    USAGE_EXIT_CODE,
    launched_by_us,
    rank_here,
    world_size,
)
from stagewise.training.workers.lifeline import Lifeline
from stagewise.training.workers.meeting import store_of_all

RANK_0_SECONDS = 3.0


@contextmanager
def joined(timeout: float | None = None, *, forms: bool = True) -> Iterator[None]:
    """Join the default process group: gloo on CPU, and NCCL or its like if there is a GPU.

    Workers that share a GPU must not be bound to it, which would connect them by NCCL at once.
    `timeout` is in seconds, None for torch's. Unless this `forms` the group, it is formed inside.
    """
    if forms:
        patience = timedelta_of(timeout)
        store = store_of_all(patience or dist.default_pg_timeout)
        form_group(store, rank_here(), world_size(), patience)
    try:
        yield
    except SystemExit:
        _leave()
        raise
    # Not after a failure: other ranks may not get here, and waiting for them would hide its cause.
    _leave()


def timedelta_of(timeout: float | None) -> timedelta | None:
    """Return it a little longer: torch's default would be taken for nobody's choice."""
    return None if timeout is None else timedelta(seconds=timeout, microseconds=1)


def form_group(store: Store, rank: int, size: int, timeout: timedelta | None) -> None:
    """Form the default process group with the others that come to `store`."""
    form = partial(
        dist.init_process_group, store=store, rank=rank, world_size=size, timeout=timeout
    )
    if found := accelerators():
        device = found[int(os.environ["LOCAL_RANK"]) % len(found)]
        shared = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) > len(found)
        backend = dist.get_default_backend_for_device(device)
        torch.accelerator.set_device_index(device.index)
        form(f"cpu:gloo,{device.type}:{backend}", device_id=None if shared else device)
    else:
        form("gloo")


def _leave() -> None:
    """Leave the process group, and end its threads.

    A thread that frees a finished work's tensor while Python finalises would abort the process
    ("terminate called without an active exception"; see pytorch/pytorch#179291).
    """
    disconnect()
    gc.collect()  # Pipelines, which refer to groups
    dist.destroy_process_group()


@contextmanager
def report_failure_once(lifeline: Lifeline) -> Iterator[None]:
    """Report an error of this worker once, then end the process.

    Our own launcher prints the first cause from the error files. Under torchrun the rank that fails
    first prints it; before ranks are connected, rank 0 prints the user's mistakes, which all find.
    """
    try:
        yield
    except Exception as error:
        usage = isinstance(error, UsageError)
        if launched_by_us():
            get_error_handler().record_exception(error)
        is_first = leave(error)
        again = isinstance(error, CheckpointError) or not usage  # see `would_come_again`
        if launched_by_us() and again and is_first is not False and len({*num_restarts()}) > 1:
            print(f"{last_words(error)}\nstarting the workers again", file=sys.stderr)
        if not launched_by_us() and is_first is not False and not isinstance(error, PeerError):
            if usage and is_first is None and os.environ["RANK"] != "0":
                # Rank 0 finds the same, tells it and ends, upon which torchrun ends us.
                time.sleep(RANK_0_SECONDS)
            if not usage or error.__cause__ is not None:
                traceback.print_exception(error.__cause__ or error)
            print(f"error: {error if usage else last_words(error)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        lifeline.tidy()
        # A plain exit would wait for the process group's threads, and they for other ranks.
        os._exit(USAGE_EXIT_CODE if usage else FAILURE_EXIT_CODE)
