"""What one call of the pipeline carries: its mode, microbatches, weights and randomness."""

import enum
from dataclasses import dataclass, field

import torch

from stagewise.engine.batchnorm import BatchNorms
from stagewise.engine.randomness import CellRandomness


class Mode(enum.IntEnum):
    """What the caller asked for."""

    TRAIN = 1
    EVALUATE = 2
    PREDICT = 3


@dataclass(kw_only=True)
class Call:
    """One call on one rank. Lists are indexed by microbatch and empty where this rank has none.

    `sizes[m]` is the number of samples in microbatch m. The last stage fills `losses`
    (detached, unweighted) and, for PREDICT, `outputs`; the first fills `input_gradients`.
    """

    mode: Mode
    recomputed: frozenset[tuple[int, int]] = frozenset()
    inputs: list[object] = field(default_factory=list)
    targets: list[object] = field(default_factory=list)
    sizes: tuple[int, ...] = ()
    randomness: dict[torch.device, CellRandomness] = field(default_factory=dict)
    batchnorms: BatchNorms = field(default_factory=lambda: BatchNorms(()))
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, object] = field(default_factory=dict)
    input_gradients: dict[int, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)

    def weight(self, m: int) -> float:
        """Microbatch m's share of the minibatch."""
        return self.sizes[m] / sum(self.sizes)
