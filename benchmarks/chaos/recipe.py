"""What chaos strikes: four small cells with dropout, AdamW, and a schedule of learning rates."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.chaos.strike import next_step, strike

WIDTH, BATCH, NUM_CELLS, NUM_BATCHES = 16, 8, 4, 4
find_nonfinite = True


class Cell(nn.Module):
    """A linear layer and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.tanh(self.linear(x))) * strike("forward")
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * strike("backward"))  # type: ignore[no-untyped-call]
        return x + y


def model() -> nn.Sequential:
    """The chain, in float64: runs that go on with other ranks differ by rounding alone."""
    return nn.Sequential(*(Cell() for _ in range(NUM_CELLS))).double()


class Shuffled:
    """Draws from torch's generator, as a shuffling DataLoader does."""

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(NUM_BATCHES):
            next_step()
            strike("data")
            x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
            yield x, x.roll(1, 1)


def data(split: str) -> Iterable[tuple[Tensor, Tensor]] | None:
    """No validation data."""
    return Shuffled() if split == "train" else None


def loss(output: Tensor, target: Tensor) -> Tensor:
    """A mean over elements."""
    return nn.functional.mse_loss(output, target) * strike("loss")


class Optimizer(torch.optim.AdamW):
    """AdamW that can fail."""

    def step(self, closure: Any = None) -> Any:
        strike("optimizer")
        return super().step(closure)


def optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """With a rate that the schedule lowers."""
    return Optimizer(parameters, lr=1e-2)


def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """An exponential one."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)


def _rate(step: int) -> float:
    strike("scheduler")
    return 0.9**step
