"""A rank that hangs is named by those that wait for it, and does not outlive them."""

import contextlib
import io
import threading
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

import stagewise
from stagewise.engine.transport.connect import between_processes
from stagewise.errors import PeerError
from tests.harness import Pool, Raised

TIMEOUT = 4.0  # of the process group
FOR_EVER = 1000


class Sleeper(nn.Module):
    """Hangs on rank 1 once `hangs`."""

    hangs = False

    def forward(self, x: Tensor) -> Tensor:
        if self.hangs and dist.get_rank() == 1:
            time.sleep(FOR_EVER)
        return x


def hanging_case(where: str) -> tuple[str, str]:
    """What rank 0 raises and prints while rank 1 sleeps in a cell, or between steps."""
    torch.manual_seed(0)
    sleeper = Sleeper()
    model = nn.Sequential(nn.Linear(3, 3), sleeper, nn.Linear(3, 1))
    plan = stagewise.Plan(balance=(1, 2), num_microbatches=2, schedule="1f1b")
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    pipe.step(x, target=y)
    sleeper.hangs = where == "cell"
    if where == "data" and dist.get_rank() == 1:
        time.sleep(FOR_EVER)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            pipe.step(x, target=y)
        except PeerError as error:
            return str(error), printed.getvalue()
    raise AssertionError("no error")


def outcomes(where: str) -> list[object]:
    pool = Pool(2, timeout=TIMEOUT)
    try:
        return pool.outcomes(hanging_case, where, seconds=60)
    finally:
        if pool.alive:
            pool.kill()


def test_a_cell_that_hangs_is_named_and_ended() -> None:
    first, second = outcomes("cell")
    assert isinstance(first, tuple)
    error, printed = first
    assert "rank 1 (" in error
    assert "is in 1F0, cell '1', in step" in error
    assert "-> rank 1" in printed
    assert "rank 0" in printed
    assert "waits for the gradient of microbatch 0" in printed
    assert "time.sleep(FOR_EVER)" in printed
    assert isinstance(second, Raised)
    assert second.error == "died"  # by its watchdog, well before it would have woken up


def test_a_rank_that_does_not_call_is_named() -> None:
    pool = Pool(2, timeout=TIMEOUT)
    try:
        for link in pool._links:
            link.send((hanging_case, ("data",)))
        assert pool._links[0].poll(60)
        error, printed = pool._links[0].recv()
    finally:
        pool.kill()
    assert "is between calls" in error
    assert "-> rank 1" in printed
    assert "time.sleep(FOR_EVER)" in printed


def groups_case() -> int:
    """How many watchdogs run after a second group has taken the first one's place."""
    for _ in range(2):
        group = dist.new_group([0, 1])
        between_processes(torch.device("cpu"), group)
        dist.destroy_process_group(group)
    between_processes(torch.device("cpu"))
    watchdogs = [one for one in threading.enumerate() if one.name == "stagewise watchdog"]
    return len(watchdogs)


def test_a_destroyed_group_leaves_no_watchdog() -> None:
    pool = Pool(2)
    try:
        assert pool.run(groups_case) == [1, 1]
    finally:
        pool.kill()
