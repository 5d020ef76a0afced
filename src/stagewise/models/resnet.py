"""ResNet (He et al., arXiv:1512.03385), as torchvision builds it: one block is one cell.

A bottleneck strides in its 3x3 convolution, not in its first 1x1, and convolutions start as in
arXiv:1502.01852 by fan-out. So the parameter counts are torchvision's: ResNet-50 25,557,032,
ResNet-101 44,549,160.
"""

from torch import Tensor, nn

from stagewise.errors import ModelError


class Conv(nn.Conv2d):
    """A convolution without bias that keeps the size but for its stride, started by fan-out."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, size, stride, size // 2, bias=False)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class Block(nn.Module):
    """A residual block: `body`, added to the input or, where the shapes differ, its projection."""

    expansion: int

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.body = self.make_body(in_channels, channels, stride)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                Conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )
        self.relu = nn.ReLU()

    @staticmethod
    def make_body(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        """The layers beside the shortcut."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[b, in_channels, h, w] to [b, channels * expansion, h / stride, w / stride]."""
        added: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return added


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    expansion = 1

    @staticmethod
    def make_body(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        """See Block."""
        return nn.Sequential(
            *_conv_norm(in_channels, channels, 3, stride),
            nn.ReLU(),
            *_conv_norm(channels, channels, 3),
        )


class Bottleneck(Block):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many."""

    expansion = 4

    @staticmethod
    def make_body(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        """See Block."""
        return nn.Sequential(
            *_conv_norm(in_channels, channels, 1),
            nn.ReLU(),
            *_conv_norm(channels, channels, 3, stride),
            nn.ReLU(),
            *_conv_norm(channels, 4 * channels, 1),
        )


# depth -> block, blocks in each of the four groups (arXiv:1512.03385, table 1)
DEPTHS: dict[int, tuple[type[Block], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def resnet(
    depth: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
    small_images: bool = False,
) -> nn.Sequential:
    """ResNet-`depth`: images [b, in_channels, h, w] to scores [b, num_classes].

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the first group; each further one doubles them.
        small_images: begin with a 3x3 convolution at full size, as the paper does for CIFAR-10
            (section 4.2), in place of 7x7 and pooling, which divide the size by 4.

    Raises:
        ModelError: there is no ResNet of this depth.

    Example:
        >>> import torch
        >>> resnet(18, num_classes=10, width=8)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    if depth not in DEPTHS:
        raise ModelError(f"there is no ResNet-{depth}; choose from {', '.join(map(str, DEPTHS))}")
    make_block, numbers = DEPTHS[depth]
    size, stride = (3, 1) if small_images else (7, 2)
    cells: list[nn.Module] = [*_conv_norm(in_channels, width, size, stride), nn.ReLU()]
    if not small_images:
        cells.append(nn.MaxPool2d(3, 2, 1))
    channels = width
    for group, number in enumerate(numbers):
        for index in range(number):
            stride = 2 if group and not index else 1
            cells.append(make_block(channels, width << group, stride))
            channels = (width << group) * make_block.expansion
    cells += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*cells)


def _conv_norm(
    in_channels: int, out_channels: int, size: int, stride: int = 1
) -> tuple[nn.Module, nn.Module]:
    return Conv(in_channels, out_channels, size, stride), nn.BatchNorm2d(out_channels)
