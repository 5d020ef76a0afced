"""What a cell does that lets the full batch differ: it draws, normalises, or changes buffers.

And how what cells take and return is split, as reference 2 saw it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.batch.values import Structure, take_apart
from stagewise.model.cell import Cell, Piece


class Unsplittable(Exception):
    """A boundary's tensors cannot be told apart by samples, so nothing can be proved."""


@dataclass(frozen=True)
class Shapes:
    """A value without its tensors' numbers; what else it holds may be sizes of the batch."""

    tensors: list[torch.Size]
    structure: Structure


@dataclass(frozen=True)
class Splits:
    """How what the cells take and return is split, by cell index."""

    parts: dict[int, list[Shapes]] = field(default_factory=dict)  # taken, in every microbatch
    wholes: dict[int, Shapes] = field(default_factory=dict)  # returned, for the whole minibatch


@dataclass
class Traits:
    """What reference 2 saw: why the full batch may differ, and how cells' inputs are split."""

    draws: dict[int, str] = field(default_factory=dict)  # cell index -> name
    normalises: dict[int, str] = field(default_factory=dict)
    changes: dict[int, str] = field(default_factory=dict)
    loss_draws: bool = False
    splits: dict[bool, Splits] = field(default_factory=dict)  # by whether training

    @property
    def cells(self) -> set[int]:
        """The cells that mathematics lets differ between microbatches and the full batch."""
        return {*self.draws, *self.normalises, *self.changes}

    def reason(self) -> str:
        """Why the full batch differs, for people; empty where nothing explains it."""
        changes = {i: n for i, n in self.changes.items() if i not in self.normalises}
        draws = [*self.draws.values(), *(["the loss"] if self.loss_draws else [])]
        clauses = (
            ("BatchNorm's statistics by microbatch", self.normalises.values()),
            ("random numbers", draws),
            ("buffers that every forward changes", changes.values()),
        )
        return ", ".join(f"{what} ({', '.join(names)})" for what, names in clauses if names)


def buffers_of(cell: Cell) -> list[Tensor]:
    """Copies of the cell's buffers."""
    return [buffer.detach().clone() for buffer in cell.module.buffers()]


def uses_batch_statistics(cell: Cell) -> bool:
    """Whether a BatchNorm in it normalises by the batch, in its present mode."""
    norms = [module for module in cell.module.modules() if isinstance(module, _BatchNorm)]
    return any(norm.training or norm.running_mean is None for norm in norms)


def shapes_of(value: object) -> Shapes:
    """Of the tensors in `value`."""
    tensors, structure = take_apart(value)
    return Shapes([tensor.shape for tensor in tensors], structure)


def named(cell: Cell) -> str:
    """A cell for people."""
    return (
        cell.name if isinstance(cell.module, Piece) else f"{cell.name} {type(cell.module).__name__}"
    )
