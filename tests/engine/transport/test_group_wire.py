"""Sent tensors are let go once they have left, also where works do not tell."""

import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from stagewise.engine.transport.wires.group_wire import KEPT_BYTES, Outbox
from tests.harness import Pools


class Work:
    """A work that ends when told, or fails."""

    def __init__(self, error: str | None = None) -> None:
        self.done, self.error = False, error

    def is_completed(self) -> bool:
        return False  # as gloo's

    def wait(self) -> None:
        while not self.done:
            time.sleep(0.001)
        if self.error:
            raise RuntimeError(self.error)


def test_what_has_left_is_let_go_before_the_end() -> None:
    outbox, work = Outbox(), Work()
    large = torch.zeros(KEPT_BYTES // 4 + 1)
    kept = weakref.ref(large)
    outbox.add(work, large)  # type: ignore[arg-type]
    del large
    assert kept() is not None
    work.done = True
    deadline = time.monotonic() + 10
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert kept() is None
    outbox.finish()


def test_a_lost_receiver_is_told_at_the_end() -> None:
    for num_bytes in (4, KEPT_BYTES + 4):
        outbox, work = Outbox(), Work("connection closed")
        outbox.add(work, torch.zeros(num_bytes // 4))  # type: ignore[arg-type]
        work.done = True
        with pytest.raises(RuntimeError, match="connection closed"):
            outbox.finish()


def test_a_gpus_works_are_never_waited_for_on_another_thread() -> None:
    """There, a wait makes the thread's stream wait: that on which the main thread computes."""
    threads: list[threading.Thread] = []

    class GpuWork(Work):
        def wait(self) -> None:
            threads.append(threading.current_thread())

    outbox, header = Outbox(), Work()
    for _ in range(3):  # "meta" stands for a GPU: bytes of no memory
        outbox.add(GpuWork(), torch.empty(KEPT_BYTES, device="meta"))  # type: ignore[arg-type]
        outbox.add(header, torch.zeros(KEPT_BYTES))  # type: ignore[arg-type]
    header.done = True
    outbox.finish()
    assert threads == [threading.current_thread()] * 3


def send_much() -> float:
    outbox = Outbox()
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    total = 0.0
    for index in range(6):
        tensor = torch.full((KEPT_BYTES // 8,), float(index))
        if rank == 0:
            outbox.add(group.send([tensor], 1, 0), tensor)
        else:
            group.recv([tensor], 0, 0).wait()
            total += float(tensor.mean())
    outbox.finish()
    return total


def test_over_gloo(pools: Pools) -> None:
    assert pools[2].run(send_much) == [0, 15]
