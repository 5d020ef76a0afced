"""What one call gives this rank's stages to do, and what they record of it."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.stage.randomness import CellRandomness
from stagewise.engine.stage.stand_ins import NO_STAND_INS, StandIns
from stagewise.engine.transport.failure import Failure
from stagewise.model.added_losses import AddedLoss, LossCollector
from stagewise.model.cell import Cell
from stagewise.schedule import Instruction

# (microbatch, -cell) -> the caller's tensors that the cell was given by name, their gradients
KeywordGradients = dict[tuple[int, int], tuple[list[torch.Tensor], list[torch.Tensor | None]]]
Shares = Mapping[str, tuple[float, ...]]  # by a loss's name, then by microbatch

Observer = Callable[[Instruction], None]
CellForward = Callable[[object, Mapping[str, object]], object]  # of a value and keywords
OTHERS = ""  # in shares: every loss that is not named


class Look(Protocol):
    """Looks at what cells and the loss function are called with."""

    def cells(
        self,
        calls: Sequence[tuple[Cell, CellForward]],
        collector: LossCollector,
        m: int,
        last: Cell | None,
    ) -> Sequence[tuple[Cell, CellForward]]:
        """`calls` of microbatch m, looking; `last` is the whole chain's last cell."""

    def loss_ran(self, loss: Callable[..., object], m: int, output: object, target: object) -> None:
        """Call once the loss function has run on `output`, and on the target in a list."""


class Mode(enum.IntEnum):
    """What the caller asked for."""

    TRAIN = 1
    EVALUATE = 2
    PREDICT = 3


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a step's loss counts where it is a part of something larger.

    `total_samples` and `total_weight` are those of all the steps whose gradients are accumulated
    (None: this step is all); `gradient_scale` multiplies every gradient, as against underflow.
    """

    total_samples: int | None = None
    total_weight: float | Mapping[str, float] | None = None
    gradient_scale: float = 1.0


@dataclass(kw_only=True)
class Record:
    """What this rank's stages have made of a call so far, by microbatch.

    The last stage fills `losses` (detached, unweighted, by name) and, for PREDICT and where they
    are kept, `outputs`; the first fills `input_gradients`; every stage `added`, in the order of its
    cells, and every cell that was given keyword arguments `keyword_gradients`. `failure` is what
    went wrong here; a `lost` rank computes nothing more, for that or since what it needs will not
    come.
    """

    losses: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    added: dict[int, list[AddedLoss]] = field(default_factory=dict)
    outputs: dict[int, object] = field(default_factory=dict)
    input_gradients: dict[int, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)
    keyword_gradients: KeywordGradients = field(default_factory=dict)
    failure: Failure | None = None
    lost: bool = False

    def fail(self, failure: Failure) -> None:
        """Note why this rank computes nothing more."""
        self.failure, self.lost = failure, True


class Parts(NamedTuple):
    """This rank's part of a batch, by microbatch; empty where it has none.

    `leaves` are (the caller's target, the one that the loss gets and whose `.grad` counts).
    """

    inputs: Sequence[object] = ()
    targets: Sequence[object] = ()
    leaves: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    keywords: Sequence[Mapping[str, object]] = ()


NO_PARTS = Parts()


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call on one rank.

    `sizes[m]` is the number of samples in microbatch m, `by_samples[m]` its share of them;
    `shares[name][m]` is what the loss `name` of microbatch m counts, OTHERS standing for all that
    have no entry, which count by samples if it has none either.
    """

    mode: Mode
    sizes: tuple[int, ...]
    by_samples: tuple[float, ...]
    signature: int = 0  # equal for batches of equal forms
    recomputed: frozenset[tuple[int, int]] = frozenset()  # (stage, microbatch)
    parts: Parts = NO_PARTS
    num_args: int = 1  # positional arguments of the model's first cell
    shares: Shares = field(default_factory=dict)
    gradient_scale: float = 1.0
    can_add_losses: bool = True  # their share, by samples, is known
    keeps_outputs: bool = False
    is_autocast: bool = False
    randomness: Mapping[torch.device, CellRandomness] = field(default_factory=dict)
    stand_ins: StandIns = NO_STAND_INS
    batchnorms: BatchNorms = field(default_factory=lambda: BatchNorms(()))
    look: Look | None = None
    record: Record = field(default_factory=Record)
