"""U-Net (Ronneberger et al., arXiv:1505.04597) in the size family (B, C) of torchgpipe.

torchgpipe (arXiv:2004.09910, section 5) simplifies it: B convolutions of 3x3 at each of 5 levels
of the way down, at the bottom and at each level up, C channels at the top, doubled by every
level, nearest-neighbour upsampling, instance normalisation. The long connections are skips: each
level is a SkipScope around the levels below it.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's users know)
from torch import Tensor, nn

from stagewise.errors import ModelError
from stagewise.model.skip import SkipScope, pop, skippable, stash


@skippable(stash=["features"])
class Down(nn.Module):
    """Keeps [b, c, h, w] for the way up, and halves it."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to [b, c, h // 2, w // 2]."""
        stash("features", x)
        return F.max_pool2d(x, 2)


@skippable(pop=["features"])
class Up(nn.Module):
    """Doubles the image, to the size that it had on the way down, and puts that beside it."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to [b, 2 c, ...]."""
        features: Tensor = pop("features")
        x = F.interpolate(x, scale_factor=2.0)
        missing = [features.shape[dim] - x.shape[dim] for dim in (3, 2)]  # 1 where it was odd
        x = F.pad(x, (0, missing[0], 0, missing[1]))
        return torch.cat([x, features], 1)


def unet(
    num_convs: int,
    channels: int,
    *,
    depth: int = 5,
    in_channels: int = 3,
    out_channels: int = 1,
    dropout: float = 0.1,
) -> SkipScope:
    """U-Net (B, C): images [b, in_channels, h, w] to scores [b, out_channels, h, w].

    Args:
        num_convs: B, convolutions at every level, down and up.
        channels: C, at the top; a multiple of 2.
        depth: levels above the bottom; h and w must be at least 2^depth, and one of them twice
            that, since instance normalisation takes more than one pixel.
        dropout: of whole channels, after every convolution.

    Raises:
        ModelError: there is no convolution at all, or an odd number of channels.

    Example:
        >>> import torch
        >>> unet(2, 4, depth=2)(torch.zeros(1, 3, 18, 21)).shape
        torch.Size([1, 1, 18, 21])
    """
    if num_convs < 1 or channels % 2:
        raise ModelError(
            f"unet({num_convs}, {channels}) needs at least 1 convolution a level and an even "
            "number of channels, since the last level halves them"
        )

    def convs(before: int, between: int, after: int) -> nn.Sequential:
        ends = [before, *[between] * (num_convs - 1), after]
        return nn.Sequential(*map(lambda a, b: _conv(a, b, dropout), ends, ends[1:]))

    bottom = channels << (depth - 1)
    inside: list[nn.Module] = [convs(bottom, 2 * bottom, bottom)]
    for level in reversed(range(depth)):
        own = channels << level
        above = own // 2 if level else in_channels
        scope = SkipScope(
            convs(above, own, own), Down(), *inside, Up(), convs(2 * own, own // 2, own // 2)
        )
        inside = [scope]
    return SkipScope(*inside, nn.Conv2d(channels // 2, out_channels, 1, bias=False))


def _conv(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.Dropout2d(dropout),
        nn.InstanceNorm2d(out_channels),
        nn.LeakyReLU(),
    )
