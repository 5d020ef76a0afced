"""Who tells why a run ends."""

import torch
import torch.distributed as dist
from torch import nn

import stagewise
from stagewise.engine.transport.connect import leave
from stagewise.errors import CellError, PeerError
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
