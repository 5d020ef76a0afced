"""A recipe: a narrow ResNet-18 that classifies clothes.

    stagewise train examples/resnet.py --stages 2 --steps 300

The images, and what to install for them, are in `fashion.py`. Batch normalisation normalises
each microbatch: 128 images in 8 microbatches are 16 at a time.
"""

from collections.abc import Iterable

import torch
from fashion import NUM_CLASSES, data, loss, metrics
from torch import nn

from stagewise.models import resnet

__all__ = ["data", "loss", "metrics", "model", "optimizer"]


def model() -> nn.Sequential:
    """A quarter of ResNet-18's width; 0.7 million parameters."""
    return resnet(18, num_classes=NUM_CLASSES, in_channels=1, width=16, small_images=True)


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Momentum, as in the paper, with a smaller step for the shorter training."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)
