"""Workloads for `benchmarks.auto`: equal and unequal models, with and without skips."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's users know)
from torch import Tensor, nn

import stagewise
from benchmarks.ragged import LONGEST, lines, padded, together
from benchmarks.ragged import loss as line_loss
from stagewise.models import decoder_lm, transformer, unet
from stagewise.testing import EmulatedDevice, emulated_model

DEVICE = EmulatedDevice()
UNEQUAL = 50.0, 200.0, 80.0, 300.0, 60.0, 150.0, 90.0, 250.0
WORDS = 256
Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, freshly made with the same weights, a batch, and the mean loss."""

    model: nn.Sequential
    inputs: Any
    target: Any
    loss: Loss
    weight: Callable[[Tensor], Tensor] | None = None  # of a microbatch's loss


@dataclass(frozen=True)
class Workload:
    """A row of the table: a task for a number of devices and microbatches.

    `chain`: torch.distributed.pipelining can run its cells, which pass on one tensor.
    """

    name: str
    num_devices: int
    num_microbatches: int
    task: Callable[[bool], Task]  # of whether a small one will do
    chain: bool = True
    is_emulated: bool = False


class Cell(nn.Module):
    """Layers that are never cut."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Through all of them."""
        found: Tensor = self.layers(x)
        return found


class LowRank(nn.Module):
    """LoRA: a frozen layer, and a product of two small ones beside it."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        found: Tensor = self.layer(x) + self.up(self.down(x))
        return found


def emulated(weights: Sequence[float], num_devices: int, num_microbatches: int) -> Workload:
    """Cells that sleep, backward twice as long as forward, half of it for the weights."""
    each = 0.82 / num_microbatches / 3 / sum(weights) * num_devices

    def task(quick: bool) -> Task:
        forward = [weight * each for weight in weights]
        model = emulated_model(forward, [2 * f for f in forward], DEVICE, forward)
        batch = torch.zeros(num_microbatches, 1024)
        return Task(model, batch, batch, lambda output, target: output.mean())

    kind = "unequal" if len(set(weights)) > 1 else "equal"
    return Workload(
        f"{len(weights)} {kind} emulated cells",
        num_devices,
        num_microbatches,
        task,
        is_emulated=True,
    )


def _tokens(samples: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, WORDS, (samples, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def word_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy of the next word."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _decoder(num_layers: int, width: int, quick: bool) -> nn.Sequential:
    torch.manual_seed(0)
    width = width // 2 if quick else width
    return decoder_lm(
        vocabulary=WORDS,
        num_layers=num_layers,
        width=width,
        num_heads=width // 32,
        context=128,
        dropout=0.0,
    )


def demo(quick: bool) -> Task:
    """The demo's size: 8 blocks of width 192, samples of 64 bytes."""
    model = _decoder(8, 192, quick)
    return Task(model, *_tokens(16, 64), word_loss)


def gpt2(quick: bool) -> Task:
    """A shallow GPT-2: 12 blocks of width 256 on 128 tokens."""
    model = _decoder(12, 256, quick)
    return Task(model, *_tokens(16, 128), word_loss)


def unequal_cnn(quick: bool) -> Task:
    """25 layers: each halving of the image makes a layer's work and its message smaller."""
    torch.manual_seed(0)
    widths = [3, *[16] * 6, *[32] * 6, *[64] * 6, *[96] * 6]
    layers = [
        Cell(nn.Conv2d(a, b, 3, 2 if b > a > 3 else 1, 1), nn.ReLU()) for a, b in pairwise(widths)
    ]
    model = nn.Sequential(
        *layers, Cell(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    )
    size = 32 if quick else 96
    return Task(model, torch.randn(32, 3, size, size), torch.randint(0, 10, (32,)), F.cross_entropy)


def pictures(quick: bool) -> Task:
    """A U-Net, whose long connections jump over up to all cells."""
    torch.manual_seed(0)
    size, channels = (32, 4) if quick else (64, 12)
    model = unet(2, channels, depth=3, dropout=0.0)
    image = torch.randn(32, 3, size, size)
    return Task(model, image, image[:, :1].sin(), F.mse_loss)


def translation(quick: bool) -> Task:
    """An encoder and a decoder; every layer of the latter reads what the former ends with."""
    torch.manual_seed(0)
    width = 64 if quick else 192
    model = transformer(4, 4 * width, width // 32, vocabulary=WORDS, width=width, dropout=0.0)
    source, (words, following) = torch.randint(1, WORDS, (16, 64)), _tokens(16, 64)
    return Task(model, (source, words), following, word_loss)


def fine_tuning(quick: bool) -> Task:
    """LoRA: everything is frozen but products of rank 8 beside every feed-forward layer."""
    model = _decoder(8, 192, quick).requires_grad_(False)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear) and child.in_features <= child.out_features:
                setattr(module, name, LowRank(child, 8))
    return Task(model, *_tokens(16, 64), word_loss)


def ragged(quick: bool) -> Task:
    """Lines of plays, packed into microbatches of as many padded words, as far as possible."""
    texts = lines()[:: len(lines()) // 64][:64]
    groups = stagewise.pack_samples([len(text) for text in texts], 8, padded)
    parts = [together([texts[sample] for sample in group]) for group in groups]
    torch.manual_seed(0)
    width = 96 if quick else 192
    model = decoder_lm(
        vocabulary=256, num_layers=8, width=width, num_heads=4, context=LONGEST, dropout=0.0
    )
    words, following = map(stagewise.Microbatches, zip(*map(_shifted, parts), strict=True))
    return Task(model, words, following, line_loss, lambda target: (target != 0).sum())


def _shifted(words: Tensor) -> tuple[Tensor, Tensor]:
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


WORKLOADS = (
    emulated((1.0,) * 24, 4, 16),
    emulated((1.0,) * 24, 8, 32),
    emulated(UNEQUAL * 3, 4, 16),
    emulated(UNEQUAL * 3, 8, 32),
    Workload("demo", 2, 8, demo),
    Workload("GPT-2", 2, 8, gpt2),
    Workload("unequal CNN", 2, 8, unequal_cnn),
    Workload("U-Net", 2, 8, pictures, chain=False),
    Workload("encoder-decoder", 2, 8, translation, chain=False),
    Workload("ragged lengths", 2, 8, ragged, chain=False),
    Workload("LoRA", 2, 8, fine_tuning),
)
