"""What one call of the pipeline carries: its mode, microbatches, weights and randomness."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.stage.randomness import CellRandomness
from stagewise.engine.stage.stand_ins import StandIns
from stagewise.engine.transport.failure import Failure
from stagewise.errors import BatchError
from stagewise.model.added_losses import AddedLoss, LossCollector
from stagewise.model.cell import Cell
from stagewise.schedule import Instruction

# (microbatch, -cell) -> the caller's tensors that the cell was given by name, their gradients
KeywordGradients = dict[tuple[int, int], tuple[list[torch.Tensor], list[torch.Tensor | None]]]


CellForward = Callable[[object, Mapping[str, object]], object]  # of a value and keywords


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
class Call:
    """One call on one rank. Lists are indexed by microbatch and empty where this rank has none.

    `sizes[m]` is the number of samples in microbatch m; `shares[name][m]` what the loss `name`
    of microbatch m counts, "" standing for all others; by samples where neither is given. The
    last stage fills `losses` (detached, unweighted, by name) and, for PREDICT and with
    `keeps_outputs`, `outputs`; the first fills `input_gradients`; every stage `added`, in the
    order of its cells, and every cell that was given keyword arguments `keyword_gradients`.
    `failure` is what went wrong here; a `lost` rank computes nothing more, for that or since what
    it needs will not come. `agreed` is the loss and its parts by name, once all ranks know it.
    `target_leaves` are (the caller's tensor, the one that the loss gets and whose `.grad` counts).
    """

    mode: Mode
    recomputed: frozenset[tuple[int, int]] = frozenset()
    inputs: list[object] = field(default_factory=list)
    targets: list[object] = field(default_factory=list)
    sizes: tuple[int, ...] = ()
    shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    scaling: Scaling = Scaling()
    keywords: list[dict[str, object]] = field(default_factory=list)
    num_args: int = 1  # positional arguments of the model's first cell
    ready: bool = False  # the caller gave Microbatches, and gets outputs as such
    batch_dim: int = 0  # of the outputs
    shared: bool = False  # some stage has replicas: its ranks run some of its microbatches each
    keeps_outputs: bool = False
    randomness: dict[torch.device, CellRandomness] = field(default_factory=dict)
    stand_ins: StandIns = field(default_factory=StandIns)
    look: Look | None = None
    batchnorms: BatchNorms = field(default_factory=lambda: BatchNorms(()))
    losses: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    added: dict[int, list[AddedLoss]] = field(default_factory=dict)
    outputs: dict[int, object] = field(default_factory=dict)
    input_gradients: dict[int, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)
    keyword_gradients: KeywordGradients = field(default_factory=dict)
    target_leaves: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    failure: Failure | None = None
    lost: bool = False
    agreed: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None

    def fail(self, failure: Failure) -> None:
        """Note why this rank computes nothing more."""
        self.failure, self.lost = failure, True

    def weight(self, m: int) -> float:
        """Microbatch m's share of the samples."""
        return self.sizes[m] / (self.scaling.total_samples or sum(self.sizes))

    def check_added(self) -> None:
        """Raise BatchError if what `add_loss` added would count wrong: it counts by samples."""
        if self.scaling.total_weight is not None and self.scaling.total_samples is None:
            raise BatchError(
                "total_weight was given, but a cell adds a loss with add_loss, which counts by "
                "samples; give total_samples too"
            )

    def share(self, name: str, m: int) -> float:
        """What the loss `name` of microbatch m counts."""
        by_microbatch = self.shares.get(name, self.shares.get(""))
        return self.weight(m) if by_microbatch is None else by_microbatch[m]

    def counts(self, m: int) -> bool:
        """Whether any loss of microbatch m may count."""
        return "" not in self.shares or any(shares[m] for shares in self.shares.values())


Observer = Callable[[Instruction], None]
