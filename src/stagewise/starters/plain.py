"""The recipe for code of one's own."""

RECIPE = '''"""A recipe to start from. Train it: stagewise train @FILE@ --stages 2"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, FEATURES, CLASSES = 2048, 16, 4  # of the made-up data below
WIDTH, BATCH, LEARNING_RATE = 64, 32, 3e-3


def model():
    """Your model: any module. A sequence of layers is cut between them, others are captured."""
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )


def data(split):
    """Your data: batches (inputs, target) of "train", and of "validation" (or None)."""
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)  # same on every rank
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    target = inputs[:, :CLASSES].argmax(1)  # what is to be learned
    return DataLoader(TensorDataset(inputs, target), BATCH, shuffle=split == "train")


def loss(output, target):
    """The mean over the samples."""
    return nn.functional.cross_entropy(output, target)


def optimizer(parameters):
    """Of this rank's parameters; any optimizer of torch or of another library."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def scheduler(optimizer):
    """Stepped once after every step; saved and resumed."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)


def metrics(output, target):
    """Means over the validation data, by name."""
    return {"accuracy": (output.argmax(1) == target).float().mean()}


clip_grad_norm = 1.0  # the largest norm of all gradients together
'''
