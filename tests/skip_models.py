"""Cells that stash and pop: a U-Net's, and generated ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagewise import SkipScope, pop, skippable, stash


@skippable(stash=["features"])
class Down(nn.Module):
    """Halves an image, and stashes it together with its size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).tanh()
        stash("features", {"image": features, "size": features.shape[-1]})
        return nn.functional.avg_pool2d(features, 2)


@skippable(pop=["features"])
class Up(nn.Module):
    """Doubles an image, and joins it with what Down stashed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = pop("features")
        x = nn.functional.interpolate(x, features["size"])
        image = features["image"]
        joined: Tensor = self.conv(torch.cat([x, image], 1))
        return joined * image.sigmoid() + image  # three uses: their sum must not hang on the cut


def level(channels: int, *inside: nn.Module) -> SkipScope:
    return SkipScope(Down(channels), *inside, Up(channels))


@skippable(stash=["first"])
class Remember(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        stash("first", x)
        return x


@skippable(pop=["first"])
class Recall(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * pop("first").mean((2, 3), keepdim=True)  # type: ignore[no-any-return]


def unet(norm: nn.Module, dropout: float) -> nn.Module:
    """Two levels in each other, a third beside them, and a skip past all of these."""
    return SkipScope(
        nn.Conv2d(3, 4, 3, padding=1),
        Remember(),
        level(4, norm, level(4, nn.Conv2d(4, 4, 1), nn.Dropout2d(dropout)), nn.ReLU()),
        nn.Sequential(level(4, nn.Conv2d(4, 4, 1))),
        Recall(),
        nn.Flatten(),
        nn.Linear(4 * 36, 2),
    )


@dataclass(frozen=True)
class Wire:
    """One skip of a generated model: from cell to cell, what is stashed, how often it is used."""

    source: int
    destination: int
    what: str  # of WHATS
    num_uses: int


WHATS = ("input", "output", "middle", "pair", "order", "nothing")


class Node(nn.Module):
    """A cell that pops and stashes along its wires; its output is used twice by the next."""

    def __init__(self, width: int, index: int, wires: Sequence[Wire]) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        numbered = list(enumerate(wires))
        self.pops = [(f"wire {n}", wire) for n, wire in numbered if wire.destination == index]
        self.stashes = [(f"wire {n}", wire) for n, wire in numbered if wire.source == index]
        skippable(stash=[n for n, _ in self.stashes], pop=[n for n, _ in self.pops])(self)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.linear(x) + x.sin()
        for name, wire in self.pops:
            value = pop(name)
            for use in range(wire.num_uses):
                middle = middle + _used(value, wire.what, use)
        output = middle.tanh()
        for name, wire in self.stashes:
            stash(name, _stashed(wire.what, x, middle, output))
        return output


def _stashed(what: str, x: Tensor, middle: Tensor, output: Tensor) -> object:
    return {
        "input": x,
        "output": output,
        "middle": middle,
        "pair": {"a": [output, middle], "again": output, "constant": 0.5},
        "order": x.argsort(-1),
        "nothing": None,
    }[what]


def _used(value: object, what: str, use: int) -> Tensor | float:
    if what == "pair":
        assert isinstance(value, dict) and value["a"][0] is value["again"]
        product: Tensor = value["a"][0] * value["constant"] * value["a"][1].cos() + value["again"]
        return product
    if value is None:
        return 0.0
    assert isinstance(value, Tensor)
    return value * (0.1 + use) if value.is_floating_point() else 0.01 * value


def wired(width: int, num_cells: int, wires: Sequence[Wire]) -> SkipScope:
    return SkipScope(*(Node(width, index, wires) for index in range(num_cells)))
