"""The same training and the same faults with torch.distributed.pipelining under torchrun."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.chaos import recipe
from benchmarks.chaos.strike import next_step, strike

NUM_MICROBATCHES = 4


def main() -> None:
    """Train this rank's stage."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    cells = list(recipe.model())
    own = nn.Sequential(
        *cells[rank * len(cells) // num_ranks : (rank + 1) * len(cells) // num_ranks]
    )
    stage = PipelineStage(own, rank, num_ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, NUM_MICROBATCHES, loss_fn=recipe.loss)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
    for _ in range(int(os.environ["CHAOS_STEPS"])):
        next_step()
        strike("data")
        x = torch.randn(recipe.BATCH, recipe.WIDTH, dtype=torch.float64)
        if rank == 0:
            schedule.step(x)
        elif rank == num_ranks - 1:
            schedule.step(target=x, losses=[])
        else:
            schedule.step()
        strike("optimizer")
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
