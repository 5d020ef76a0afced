"""What a cell does that makes the full batch differ: it draws, normalises, or changes buffers.

Also how cells' inputs and outputs are split, as reference 2 saw it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.batch.values import Structure, take_apart
from stagewise.model.cell import Cell, Piece


class Unsplittable(Exception):
    """A boundary's tensors cannot be split by samples, so nothing can be proved."""


@dataclass(frozen=True)
class Shapes:
    """A value with shapes in place of tensors; its other content may depend on the batch size."""

    tensors: list[torch.Size]
    structure: Structure


@dataclass(frozen=True)
class Splits:
    """Shapes of cells' inputs and outputs, by cell index."""

    parts: dict[int, list[Shapes]] = field(default_factory=dict)  # inputs of every microbatch
    wholes: dict[int, Shapes] = field(default_factory=dict)  # outputs of the whole minibatch


@dataclass
class Traits:
    """What reference 2 found: why the full batch may differ, and how values are split."""

    draws: dict[int, str] = field(default_factory=dict)  # cell index -> name
    normalises: dict[int, str] = field(default_factory=dict)
    changes: dict[int, str] = field(default_factory=dict)
    loss_draws: bool = False
    splits: dict[bool, Splits] = field(default_factory=dict)  # by whether training

    @property
    def cells(self) -> set[int]:
        """The cells that may differ between microbatches and the full batch."""
        return {*self.draws, *self.normalises, *self.changes}

    def reason(self) -> str:
        """Return in words why the full batch differs; empty if nothing explains it."""
        changes = {i: n for i, n in self.changes.items() if i not in self.normalises}
        draws = [*self.draws.values(), *(["the loss"] if self.loss_draws else [])]
        clauses = (
            ("BatchNorm's statistics by microbatch", self.normalises.values()),
            ("random numbers", draws),
            ("buffers that every forward changes", changes.values()),
        )
        return ", ".join(f"{what} ({', '.join(names)})" for what, names in clauses if names)


def buffers_of(cell: Cell) -> list[Tensor]:
    """Return copies of the cell's buffers."""
    return [buffer.detach().clone() for buffer in cell.module.buffers()]


def uses_batch_statistics(cell: Cell) -> bool:
    """Return whether a BatchNorm in the cell normalises by the batch in its current mode."""
    norms = [module for module in cell.module.modules() if isinstance(module, _BatchNorm)]
    return any(norm.training or norm.running_mean is None for norm in norms)


def shapes_of(value: object) -> Shapes:
    """Return the shapes of the tensors in `value`."""
    tensors, structure = take_apart(value)
    return Shapes([tensor.shape for tensor in tensors], structure)


def named(cell: Cell) -> str:
    """Return a cell's name and class for messages."""
    return (
        cell.name if isinstance(cell.module, Piece) else f"{cell.name} {type(cell.module).__name__}"
    )
