"""The models and batches of the checks, and how far two runs are apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import stagewise
from benchmarks.gpu_check.machine import Machine

mse = nn.functional.mse_loss


class Block(nn.Module):
    """A decoder's layer, with torch's attention and dropout."""

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Recurrent(nn.Module):
    """An LSTM whose dropout is cuDNN's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lstm(x)[0]
        return output


class Convolution(nn.Module):
    """A convolution with BatchNorm and dropout, as one cell."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm, self.dropout = nn.BatchNorm2d(channels), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(self.norm(self.conv(x)).relu())
        return dropped


class LayerDrop(nn.Module):
    """Draws on the CPU whatever its device, and leaves itself out half of the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.linear(x)
        return x + changed if torch.rand([]) < 0.5 else 1.5 * x + 0 * changed


KINDS: Mapping[str, Callable[[int], nn.Module]] = {
    "Transformer": lambda width: Block(width, dropout=0.1),
    "BatchNorm": lambda width: Convolution(8),
    "LSTM": Recurrent,
    "draws on the CPU": LayerDrop,
    "no dropout": Block,
}


@dataclass(frozen=True)
class Subject:
    """A chain of cells of one kind, with a batch; the same values every time."""

    machine: Machine
    kind: str
    dtype: torch.dtype = torch.float32

    def model(self) -> nn.Sequential:
        """Return a new model on the device."""
        torch.manual_seed(0)
        width, num_cells = self.machine.size((64, 8), (16, 4))
        cells = nn.Sequential(*(KINDS[self.kind](width) for _ in range(num_cells)))
        return cells.to(self.machine.device, self.dtype)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and target on the device."""
        torch.manual_seed(1)
        samples = self.machine.size(32, 8)
        sizes = self.machine.size((32, 64), (6, 16))
        x = torch.randn(samples, *((8, 8, 8) if self.kind == "BatchNorm" else sizes))
        x = x.to(self.machine.device, self.dtype)
        return x, x.roll(1, 0)

    def result(self, num_stages: int, *, float32: bool = False, **options: object) -> "Result":
        """Return loss and gradients of the last of a few steps; `options` are the plan's."""
        options = {"num_microbatches": self.machine.size(8, 4), **options}
        pipe = pipeline(self.model(), num_stages, accumulate_in_float32=float32, **options)
        inputs, target = self.batch()
        for _ in range(self.machine.size(3, 1)):
            pipe.zero_grad()
            loss = pipe.step(inputs, target=target)
        return Result.of(loss, pipe)


@dataclass(frozen=True)
class Result:
    """A loss and gradients by name, on the CPU."""

    loss: Tensor
    gradients: Mapping[str, Tensor]

    @staticmethod
    def of(loss: Tensor, holder: "nn.Module | stagewise.Pipeline") -> "Result":
        named = holder.named_parameters()
        gradients = {name: p.grad.cpu() for name, p in named if p.grad is not None}
        return Result(loss.detach().cpu(), gradients)

    def difference(self, other: "Result") -> float:
        """0.0 if equal to the bit, else the largest difference relative to a gradient's largest."""
        if self.gradients.keys() != other.gradients.keys():
            return float("inf")
        pairs = [(self.loss, other.loss)]
        pairs += [(g, other.gradients[name]) for name, g in self.gradients.items()]
        if all(torch.equal(a, b) for a, b in pairs):
            return 0.0
        tiny = torch.finfo(self.loss.dtype).tiny
        return max(float((a - b).abs().max() / (a.abs().max() + tiny)) or tiny for a, b in pairs)


def pipeline(
    model: nn.Sequential,
    num_stages: int,
    *,
    devices: Sequence[torch.device] | None = None,
    accumulate_in_float32: bool = False,
    **options: object,
) -> "stagewise.Pipeline":
    """Return a pipeline of about equal stages, by default on the model's device."""
    wanted = {"schedule": "1f1b", "num_microbatches": 8, **options}
    size, longer = divmod(len(model), num_stages)
    balance = tuple(size + (stage < longer) for stage in range(num_stages))
    plan = stagewise.Plan(balance=balance, **wanted)
    return stagewise.Pipeline(
        model, plan, loss=mse, devices=devices, accumulate_in_float32=accumulate_in_float32
    )


def wide_blocks(machine: Machine, num_cells: int) -> tuple[nn.Sequential, Tensor, int]:
    """Return blocks of about a millisecond each, a batch, and its number of microbatches."""
    width, length, count = machine.size((1024, 1024, 8), (32, 8, 4))
    dtype = machine.size(torch.bfloat16, torch.float32)
    torch.manual_seed(0)
    heads = max(1, width // 64)
    model = nn.Sequential(*(Block(width, heads) for _ in range(num_cells)))
    x = torch.randn(machine.samples(4) * count, length, width, device=machine.device, dtype=dtype)
    return model.to(machine.device, dtype), x, count
