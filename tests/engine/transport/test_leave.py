"""Who tells why a run ends."""

from types import SimpleNamespace
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

import stagewise
from stagewise.engine.transport.connect import leave
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.rendezvous import Rendezvous
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.wire import Wire, Wires
from stagewise.errors import CellError, PeerError
from stagewise.mesh import Slices
from tests.harness import Pools


class Failing(nn.Module):
    """Fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("boom")


def fail_and_leave(later: int) -> tuple[str, bool | None]:
    """The error of a step, and whether it was this rank's to tell; rank `later` leaves last."""
    model = nn.Sequential(nn.Linear(2, 2), Failing())
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    try:
        pipe.step(torch.ones(4, 2), target=torch.ones(4, 2))
    except (CellError, PeerError) as error:
        if dist.get_rank() == later:
            dist.barrier()
        first = leave(error)
        if dist.get_rank() != later:
            dist.barrier()
        return type(error).__name__, first
    return "", None


def test_the_rank_that_failed_tells_it_whoever_is_faster(own_pools: Pools) -> None:
    """Under torchrun the other told nothing, and the one that failed left it to the other."""
    for later in (0, 1):
        found = own_pools[2].run(fail_and_leave, later)
        assert found == [("PeerError", False), ("CellError", True)]
        own_pools[2].kill()


def test_who_loses_another_in_a_call_sends_nothing_where_messages_are_awaited() -> None:
    """Rank 0 still waited for a gradient from rank 1, and read rank 1's last words as its header:
    "can't allocate memory: you tried to allocate 7598814338612225388 bytes".
    """
    sent = []
    wire = SimpleNamespace(rank=1, num_ranks=2, start_send=lambda parts, rank: sent.append(rank))
    for inside, frames in ((False, [0]), (True, [])):
        rendezvous = Rendezvous(cast(Wire, wire), Peers(1))
        ranks = object.__new__(Ranks)
        ranks._rendezvous, ranks._wires = rendezvous, cast(Wires, SimpleNamespace(abort=None))
        ranks.slices, ranks.is_on_mesh = Slices.one(1, 2), False
        if inside:
            ranks.fail(PeerError("rank 1 lost rank 2 while waiting for it"), None)
        rendezvous.leave("rank 1 lost rank 2 while waiting for it")
        assert sent == frames
        sent.clear()
