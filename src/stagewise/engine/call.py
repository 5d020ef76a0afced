"""What one call of the pipeline carries: its mode, microbatches, weights and randomness."""

import enum
from dataclasses import dataclass, field

import torch

from stagewise.engine.randomness import CellRandomness

# (microbatch, -cell) -> the caller's tensors that the cell was given by name, their gradients
KeywordGradients = dict[tuple[int, int], tuple[list[torch.Tensor], list[torch.Tensor | None]]]


class Mode(enum.IntEnum):
    """What the caller asked for."""

    TRAIN = 1
    EVALUATE = 2
    PREDICT = 3


@dataclass(kw_only=True)
class Call:
    """One call on one rank. Lists are indexed by microbatch and empty where this rank has none.

    `sizes[m]` is the number of samples in microbatch m. The last stage fills `losses`
    (detached, unweighted) and, for PREDICT and with `keeps_outputs`, `outputs`; the first fills
    `input_gradients`, and every cell that was given keyword arguments `keyword_gradients`.
    `target_leaves` are (the caller's tensor, the one that the loss gets and whose `.grad` counts).
    """

    mode: Mode
    recomputed: frozenset[tuple[int, int]] = frozenset()
    inputs: list[object] = field(default_factory=list)
    targets: list[object] = field(default_factory=list)
    sizes: tuple[int, ...] = ()
    keywords: list[dict[str, object]] = field(default_factory=list)
    num_args: int = 1  # positional arguments of the model's first cell
    ready: bool = False  # the caller gave Microbatches, and gets outputs as such
    keeps_outputs: bool = False
    randomness: dict[torch.device, CellRandomness] = field(default_factory=dict)
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, object] = field(default_factory=dict)
    input_gradients: dict[int, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)
    keyword_gradients: KeywordGradients = field(default_factory=dict)
    target_leaves: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def weight(self, m: int) -> float:
        """Microbatch m's share of the minibatch."""
        return self.sizes[m] / sum(self.sizes)
