"""A recipe: a small AmoebaNet-D that classifies clothes.

    stagewise train examples/amoebanet.py --stages 2 --steps 200

Every cell reads the outputs of the two before it, so a pair crosses from stage to stage. The
images, and what to install for them, are in `fashion.py`.
"""

from collections.abc import Iterable

import torch
from fashion import NUM_CLASSES, data, loss, metrics
from torch import nn

from stagewise.models import amoebanet_d

__all__ = ["data", "loss", "metrics", "model", "optimizer"]

NUM_LAYERS, NUM_FILTERS = 3, 8


def model() -> nn.Sequential:
    """AmoebaNet-D (3, 8) at the images' full size: 7 cells, 26 thousand parameters."""
    return amoebanet_d(
        NUM_LAYERS, NUM_FILTERS, num_classes=NUM_CLASSES, in_channels=1, small_images=True
    )


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """GPipe trained with RMSProp and a schedule; AdamW does with a constant rate."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
