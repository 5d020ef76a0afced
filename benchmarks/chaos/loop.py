"""A training loop of one's own under torchrun, in which one rank makes another call than the rest.

All must be told, and the step that is then repeated must be what it would have been.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.chaos import recipe
from benchmarks.chaos.strike import CHAOS
from stagewise import Pipeline, Plan, StagewiseError

WEIGHTS = "weights"  # the folder of the parameters at the end

OTHER_CALLS: dict[str, Callable[[Pipeline, Tensor], object]] = {
    "predict": lambda pipe, x: pipe.predict(x),
    "evaluate": lambda pipe, x: pipe.evaluate(x, target=x),
    "clip_grad_norm_": lambda pipe, x: pipe.clip_grad_norm_(1.0),
    "save_checkpoint": lambda pipe, x: pipe.save_checkpoint(Path("elsewhere")),
    "smaller batch": lambda pipe, x: pipe.step(x[:4], target=x[:4]),
    "other batch": lambda pipe, x: pipe.step(x + 1, target=x),
    "total_samples": lambda pipe, x: pipe.step(x, target=x, total_samples=2 * len(x)),
    "loss_scale": lambda pipe, x: pipe.step(x, target=x, loss_scale=2.0),
}


def main() -> None:
    """Train; on the rank and at the step that CHAOS names, make the other call first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    fault = json.loads(os.environ.get(CHAOS, "null"))
    torch.manual_seed(0)
    plan = Plan.from_json(Path("plan.json").read_text())
    pipe = Pipeline(recipe.model(), plan, loss=recipe.loss)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    for step in range(1, int(os.environ["CHAOS_STEPS"]) + 1):
        random = torch.Generator().manual_seed(step)
        x = torch.randn(recipe.BATCH, recipe.WIDTH, generator=random, dtype=torch.float64)
        if fault and fault["step"] == step:
            try:
                if fault["rank"] == dist.get_rank():
                    OTHER_CALLS[fault["how"]](pipe, x)
                else:
                    pipe.step(x, target=x)
            except StagewiseError as error:
                print(f"rank {dist.get_rank()} was told: {error}", flush=True)
            pipe.zero_grad()
        pipe.step(x, target=x)
        optimizer.step()
        pipe.zero_grad()
    pipe.save_checkpoint(Path(WEIGHTS))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
