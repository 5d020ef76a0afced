"""The recipe for a model of torchvision."""

RECIPE = '''"""A recipe for torchvision's @NAME@. Train it: stagewise train @FILE@ --stages 2"""

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, SIZE, SAMPLES = 10, 64, 64  # SIZE: pixels along each side
BATCH, LEARNING_RATE = 8, 1e-3


def model():
    """`weights="DEFAULT"` starts from pretrained ones; then give the head your CLASSES."""
    return torchvision.models.get_model("@NAME@", weights=None, num_classes=CLASSES)


def data(split):
    """Your images: batches (inputs, target). Replace these random ones, say by ImageFolder."""
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)  # same on every rank
    images = torch.randn(SAMPLES, 3, SIZE, SIZE, generator=generator)
    classes = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return DataLoader(TensorDataset(images, classes), BATCH, shuffle=split == "train")


def loss(output, target):
    """The mean over the samples."""
    return nn.functional.cross_entropy(output, target)


def optimizer(parameters):
    """Weight decay for matrices and kernels only: two groups of parameters."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 1e-2},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def metrics(output, target):
    """Means over the validation data, by name."""
    return {"accuracy": (output.argmax(1) == target).float().mean()}


clip_grad_norm = 1.0  # the largest norm of all gradients together
'''
