"""AmoebaNet-D (L, D) as GPipe scales it, for images.

The cells were found by evolution (Real et al., arXiv:1802.01548, appendix D). GPipe
(arXiv:1811.06965, section 3) scales their stack by L normal cells and D filters. Which nodes a
normal cell joins differs between that paper's figure and its authors' published TensorFlow code;
torchgpipe (arXiv:2004.09910) found that the code's choice gives GPipe's parameter counts, and so
it does here. Left out, as in these counts: the auxiliary classifier and dropped paths.

A cell reads the outputs of the two cells before it, so cells hand on a pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stagewise.errors import ModelError


class Outputs(NamedTuple):
    """The last cell's output [b, c, h, w], and that of the cell before it."""

    last: Tensor
    previous: Tensor


Make = Callable[[int, int], nn.Module]  # (channels, stride) -> operation


@dataclass(frozen=True)
class Genotype:
    """A kind of cell: node n + 2 adds two operations, each on an earlier node's value.

    Nodes 0 and 1 are the cell's two inputs; `joined` are the nodes that make its output.
    """

    nodes: tuple[tuple[tuple[int, Make], tuple[int, Make]], ...]
    joined: tuple[int, ...]


def _identity(channels: int, stride: int) -> nn.Module:
    return nn.Identity()  # stride is 1: in no cell does it read an input that is to be halved


def _average_pool(channels: int, stride: int) -> nn.Module:
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False)


def _max_pool(size: int, channels: int, stride: int) -> nn.Module:
    # Ceiling: 2x2 halves an odd size as the other operations do.
    return nn.MaxPool2d(size, stride, (size - 1) // 2, ceil_mode=size == 2)


def _conv_1x1(channels: int, stride: int) -> nn.Module:
    return _relu_conv_norm(channels, channels, 1, stride)


def _conv_3x3(channels: int, stride: int) -> nn.Module:
    inner = channels // 4
    return nn.Sequential(
        _relu_conv_norm(channels, inner),
        _relu_conv_norm(inner, inner, 3, stride),
        _relu_conv_norm(inner, channels),
    )


def _conv_1x7_7x1(channels: int, stride: int) -> nn.Module:
    inner = channels // 4
    return nn.Sequential(
        _relu_conv_norm(channels, inner),
        _relu_conv_norm(inner, inner, (1, 7), (1, stride)),
        _relu_conv_norm(inner, inner, (7, 1), (stride, 1)),
        _relu_conv_norm(inner, channels),
    )


_max_3x3: Make = partial(_max_pool, 3)
_max_2x2: Make = partial(_max_pool, 2)

NORMAL = Genotype(
    nodes=(
        ((1, _conv_1x1), (1, _max_3x3)),
        ((1, _identity), (0, _conv_1x7_7x1)),
        ((0, _conv_1x1), (0, _conv_1x7_7x1)),
        ((2, _max_3x3), (2, _identity)),
        ((1, _average_pool), (5, _conv_1x1)),
    ),
    joined=(0, 3, 4, 6),
)
REDUCTION = Genotype(
    nodes=(
        ((0, _max_2x2), (0, _max_3x3)),
        ((2, _identity), (1, _conv_3x3)),
        ((2, _conv_1x7_7x1), (2, _max_3x3)),
        ((3, _identity), (1, _max_2x2)),
        ((2, _average_pool), (3, _conv_1x1)),
    ),
    joined=(4, 5, 6),
)


class Stem(nn.Module):
    """The first convolution: an image to the first pair of outputs, twice the same."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Outputs:
        """[b, in_channels, h, w] to two of [b, channels, h / stride, w / stride]."""
        x = self.norm(self.conv(images))
        return Outputs(x, x)


class FactorizedReduction(nn.Module):
    """Halves an image: half the channels from its even pixels, half from its odd ones."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_channels, out_channels // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[b, in_channels, h, w] to [b, out_channels, h / 2, w / 2], rounded up."""
        x = x.relu()
        shifted = nn.functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        reduced: Tensor = self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))
        return reduced


class AmoebaCell(nn.Module):
    """One cell of `genotype`: both inputs to `channels` channels and one size, then its nodes."""

    def __init__(
        self,
        genotype: Genotype,
        channels: int,
        *,
        last_channels: int,
        previous_channels: int,
        after_reduction: bool,
    ) -> None:
        super().__init__()
        self.last = _relu_conv_norm(last_channels, channels)
        self.previous: nn.Module = nn.Identity()
        if after_reduction:  # the cell before the last one has twice the size
            self.previous = FactorizedReduction(previous_channels, channels)
        elif previous_channels != channels:
            self.previous = _relu_conv_norm(previous_channels, channels)
        self.joined = genotype.joined
        self.sources = [(left, right) for (left, _), (right, _) in genotype.nodes]
        inputs_stride = 2 if genotype is REDUCTION else 1
        self.operations = nn.ModuleList(
            make(channels, inputs_stride if source < 2 else 1)
            for pair in genotype.nodes
            for source, make in pair
        )

    def forward(self, outputs: Outputs) -> Outputs:
        """Its own output, and its last input as that of the cell before."""
        values = [self.last(outputs.last), self.previous(outputs.previous)]
        operations = iter(self.operations)
        for left, right in self.sources:
            values.append(next(operations)(values[left]) + next(operations)(values[right]))
        return Outputs(torch.cat([values[node] for node in self.joined], 1), outputs.last)


class Classifier(nn.Module):
    """The mean over all pixels to one score a class."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, outputs: Outputs) -> Tensor:
        """To [b, num_classes]."""
        scores: Tensor = self.linear(outputs.last.mean((2, 3)))
        return scores


def amoebanet_d(
    num_layers: int,
    num_filters: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    small_images: bool = False,
) -> nn.Sequential:
    """AmoebaNet-D (L, D): images [b, in_channels, h, w] to scores [b, num_classes].

    Args:
        num_layers: L, normal cells; a multiple of 3, since they stand in three groups with a
            reduction between two.
        num_filters: D, channels of the first group's nodes; each further group doubles them. A
            multiple of 8 (4 with `small_images`).
        small_images: begin at full size, as the paper does for CIFAR-10, in place of the stem
            for ImageNet, a convolution and two reductions, which divides the size by 8.

    Raises:
        ModelError: L or D is no such multiple.

    Example:
        >>> import torch
        >>> amoebanet_d(3, 16, num_classes=10)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    divisor = 4 if small_images else 8
    if num_layers < 3 or num_layers % 3 or num_filters < 1 or num_filters % divisor:
        raise ModelError(
            f"AmoebaNet-D ({num_layers}, {num_filters}): the layers must be a multiple of 3, in "
            f"three groups, and the filters of {divisor}; take for example (18, 208)"
        )
    group = [NORMAL] * (num_layers // 3)
    stem = [] if small_images else [REDUCTION] * 2
    channels = num_filters if small_images else num_filters // 4
    cells: list[nn.Module] = [Stem(in_channels, channels, 1 if small_images else 2)]
    last, previous, after_reduction = channels, channels, False
    for genotype in (*stem, *group, REDUCTION, *group, REDUCTION, *group):
        is_reduction = genotype is REDUCTION
        channels *= 2 if is_reduction else 1
        cells.append(
            AmoebaCell(
                genotype,
                channels,
                last_channels=last,
                previous_channels=previous,
                after_reduction=after_reduction,
            )
        )
        last, previous = channels * len(genotype.joined), last
        after_reduction = is_reduction
    return nn.Sequential(*cells, Classifier(last, num_classes))


def _relu_conv_norm(
    in_channels: int,
    out_channels: int,
    size: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
) -> nn.Sequential:
    sides = (size, size) if isinstance(size, int) else size
    padding = (sides[0] // 2, sides[1] // 2)
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, sides, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
    )
