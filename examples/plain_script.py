"""stagewise without its command line: a plain PyTorch training script.

    python examples/plain_script.py                              one process, two stages in it
    torchrun --nproc-per-node 2 examples/plain_script.py         one process per stage

Both print the same losses, bit for bit.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

import stagewise

NUM_STEPS, BATCH, WIDTH = 60, 64, 128


def build_model() -> nn.Sequential:
    """The plain model. Every process builds the whole and keeps only its own stage."""
    hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)]
    return nn.Sequential(nn.Linear(16, WIDTH), *hidden, nn.Linear(WIDTH, 1))


def batch(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and their values of a function to learn."""
    x = torch.rand(size, 16, generator=generator)
    return x, torch.sin(3 * x).sum(dim=1, keepdim=True)


def main() -> None:
    """Train for a few seconds and print the loss now and then."""
    if "RANK" in os.environ:  # torchrun has started several of us
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, loss = build_model(), nn.functional.mse_loss
    generator = torch.Generator().manual_seed(1)
    validation = batch(generator, 512)
    num_stages = dist.get_world_size() if dist.is_initialized() else 2

    inputs, target = batch(generator, BATCH)
    plan = stagewise.plan(
        model, inputs, target=target, loss=loss, num_stages=num_stages, num_microbatches=8
    )
    pipe = stagewise.Pipeline(model, plan, loss=loss)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-3)
    if pipe.rank == 0:
        print(
            f"cells per stage {plan.balance}, predicted bubble {plan.timeline.bubble_fraction:.0%}"
        )

    for step in range(NUM_STEPS):
        inputs, target = batch(generator, BATCH)
        optimizer.zero_grad()
        training_loss = pipe.step(inputs, target=target)  # forward and backward of all microbatches
        pipe.clip_grad_norm_(1.0)
        optimizer.step()
        if step % 20 == 19:
            inputs, target = validation
            validation_loss = pipe.evaluate(inputs, target=target)  # on every rank
            if pipe.rank == 0:
                print(
                    f"step {step + 1}: loss {training_loss:.6f}, validation {validation_loss:.6f}"
                )

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
