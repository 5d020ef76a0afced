"""The run-time cost of a capture: a captured model's forward and backward against the plain one's.

Both run in this process on the same batch with one thread, alternating, so that noise affects both
equally; the medians are compared. The models need only torch, and are small enough for Python's
overhead to be visible.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor, nn

import stagewise
from benchmarks.unmodified import UNet
from benchmarks.workers import Row, print_rows

QUICK_ROUNDS, ROUNDS = 5, 25


class Transformer(nn.Module):
    """torch's own encoder-decoder, with embeddings."""

    def __init__(self, width: int = 256, num_layers: int = 4, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Transformer(
            width, 4, num_layers, num_layers, 4 * width, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits per target token."""
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        hidden = self.body(
            self.embed(source), self.embed(target), tgt_mask=causal, tgt_is_causal=True
        )
        logits: Tensor = self.head(hidden)
        return logits


class Block(nn.Module):
    """A block of a decoder-only Transformer, as written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Residual attention, residual MLP."""
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A decoder-only language model."""

    def __init__(self, width: int, num_layers: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits per token."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def tokens(size: int, length: int) -> Tensor:
    """Some tokens."""
    return torch.arange(size * length).view(size, length) * 7 % 256


# name -> the model, and the arguments of one call
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "decoder, d=128, 8 x 64": (lambda: Decoder(128, 8), {"tokens": tokens(8, 64)}),
    "decoder, d=384, 8 x 128": (lambda: Decoder(384, 8), {"tokens": tokens(8, 128)}),
    "nn.Transformer, d=256": (Transformer, {"source": tokens(8, 64), "target": tokens(8, 48)}),
    "U-Net, 64 x 64": (lambda: UNet(16), {"x": torch.ones(8, 3, 64, 64)}),
}


def step_seconds(run: Callable[..., Any], arguments: dict[str, Tensor], model: nn.Module) -> float:
    """One forward and backward."""
    start = time.perf_counter()
    output = run(**arguments)
    (output if isinstance(output, Tensor) else output["out"]).mean().backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def row(name: str, num_rounds: int) -> Row:
    """One model, plain and captured."""
    build, arguments = CASES[name]
    torch.manual_seed(0)
    plain = build()
    model = copy.deepcopy(plain)
    start = time.perf_counter()
    captured = stagewise.capture(model, **arguments)
    capture_seconds = time.perf_counter() - start
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(num_rounds + 2):
        for own, run, owner in zip(times, (plain, captured), (plain, model), strict=True):
            seconds = step_seconds(run, arguments, owner)
            if index >= 2:
                own.append(seconds)
    before, after = map(statistics.median, times)
    return {
        "model": name,
        "cells": len(captured.chain),
        "capture s": f"{capture_seconds:.1f}",
        "plain ms": f"{1e3 * before:.1f}",
        "captured ms": f"{1e3 * after:.1f}",
        "overhead": f"{100 * (after / before - 1):+.1f}%",
    }


def main(json: bool = False, quick: bool = False) -> None:
    """Print the table; --quick takes fewer rounds."""
    torch.set_num_threads(1)
    rows = [row(name, QUICK_ROUNDS if quick else ROUNDS) for name in CASES]
    print_rows("forward and backward, plain and captured", rows, as_json=json, notes=[])


if __name__ == "__main__":
    typer.run(main)
