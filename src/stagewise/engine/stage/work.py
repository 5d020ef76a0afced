"""What one call asks of this rank's stages, and what they record."""

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.stage.randomness import CellRandomness
from stagewise.engine.transport.failure import Failure
from stagewise.errors import CellError
from stagewise.model.added_losses import AddedLoss, LossCollector, collect_losses
from stagewise.model.cell import Cell, Chain
from stagewise.schedule import Instruction

# (microbatch, -cell) -> the caller's tensors among the cell's keyword arguments, their gradients
KeywordGradients = dict[tuple[int, int], tuple[list[torch.Tensor], list[torch.Tensor | None]]]
Shares = Mapping[str, tuple[float, ...]]  # name of a loss -> weight per microbatch

Mark = tuple[torch.device, Any, Any]  # a device, events before and after
Marks = dict[Instruction, Mark]
Observer = Callable[[Instruction], None]
CellForward = Callable[[object, Mapping[str, object]], object]  # (value, keywords) -> value
Around = Callable[[Sequence[tuple[Cell, CellForward]]], Sequence[tuple[Cell, CellForward]]]
RunCell = Callable[[Cell, object, Mapping[str, object]], object]
StageGiven = tuple[object, Mapping[int, Mapping[str, object]]]  # a value; keywords by cell
Losses = torch.Tensor | Mapping[str, torch.Tensor]
# (cell, microbatch) -> a context; what runs inside runs as it did then, and is not noted
Again = Callable[[int, int], AbstractContextManager[None]]
OTHERS = ""  # in shares: every loss without an entry


class Look(Protocol):
    """Inspects the calls of stages, cells and the loss function."""

    def stage_begins(self, cells: Chain, run: RunCell, given: StageGiven, m: int) -> None:
        """Call before `cells` run on what they are given of microbatch m."""

    def cells(
        self,
        calls: Sequence[tuple[Cell, CellForward]],
        collector: LossCollector,
        m: int,
        last: Cell | None,
        again: Again,
    ) -> Sequence[tuple[Cell, CellForward]]:
        """Return `calls` of microbatch m, wrapped; `last` is the last cell of the whole chain."""

    def loss(self, loss: Callable[..., Losses], m: int, again: Again) -> Callable[..., Losses]:
        """Return the loss function for microbatch m, wrapped."""


class LateGradients(CellError):
    """A stage that trains nothing made a gradient's start all the same, so it needs a backward.

    Such as a tensor that no module has registered. Never raised to users: the call runs again.
    """


class Mode(enum.IntEnum):
    """What the caller asked for."""

    TRAIN = 1
    EVALUATE = 2
    PREDICT = 3


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a step's loss counts if the step is a part of something larger.

    `total_samples` and `total_weight` are those of all steps whose gradients are accumulated
    (None: only this one); `gradient_scale` multiplies every gradient, e.g. against underflow.
    """

    total_samples: int | None = None
    total_weight: float | Mapping[str, float] | None = None
    gradient_scale: float = 1.0


@dataclass(kw_only=True)
class Record:
    """What this rank's stages have computed in a call so far, by microbatch.

    The last stage fills `losses` (detached, unweighted, by name) and, for PREDICT or if they are
    kept, `outputs`; the first fills `input_gradients`; every stage `added`, in the order of its
    cells, and every cell with keyword arguments `keyword_gradients`. `failure` is what went wrong
    here; a `lost` rank computes nothing more: it failed, or a value it needs will not arrive.
    `partial` are the microbatches of each loss that others, which count, did not have.
    """

    losses: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    added: dict[int, list[AddedLoss]] = field(default_factory=dict)
    outputs: dict[int, object] = field(default_factory=dict)
    input_gradients: dict[int, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)
    keyword_gradients: KeywordGradients = field(default_factory=dict)
    partial: dict[str, list[int]] = field(default_factory=dict)
    failure: Failure | None = None
    lost: bool = False
    hears: Callable[[Failure], object] = lambda failure: None  # of it, at once

    def fail(self, failure: Failure) -> None:
        """Note why this rank stops computing."""
        self.hears(failure)
        self.failure, self.lost = failure, True


class Parts(NamedTuple):
    """This rank's part of a batch, by microbatch; empty where it has none.

    `leaves` are (caller's target, the leaf given to the loss in its place) pairs. `keywords` are
    the caller's, `arrived` those on each accelerator that takes some.
    """

    inputs: Sequence[object] = ()
    targets: Sequence[object] = ()
    leaves: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    keywords: Sequence[Mapping[str, object]] = ()
    arrived: Mapping[torch.device, Sequence[Mapping[str, object]]] = MappingProxyType({})


NO_PARTS = Parts()


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call on one rank.

    `sizes[m]` is the number of samples in microbatch m, `by_samples[m]` its share of them;
    `shares[name][m]` is the weight of the loss `name` in microbatch m. OTHERS stands for losses
    without an entry; without OTHERS, those are weighted by samples.
    """

    mode: Mode
    sizes: tuple[int, ...]
    by_samples: tuple[float, ...]
    first: int = 0  # the first microbatch's number among those of all data ranks
    signature: int = 0  # equal for batches of the same form
    recomputed: frozenset[tuple[int, int]] = frozenset()  # (stage, microbatch)
    first_trained: int = 0  # stages before it have no backward
    parts: Parts = NO_PARTS
    num_args: int = 1  # positional arguments of the model's first cell
    shares: Shares = field(default_factory=dict)
    gradient_scale: float = 1.0
    can_add_losses: bool = True  # their weight, by samples, is known
    keeps_outputs: bool = False
    is_autocast: bool = False
    randomness: Mapping[torch.device, CellRandomness] = field(default_factory=dict)
    around: tuple[Around, ...] = ()  # what wraps the cells' calls
    batchnorms: BatchNorms = field(default_factory=lambda: BatchNorms(()))
    look: Look | None = None
    compared: int = 0  # without a look, the microbatch whose recomputation is compared
    record: Record = field(default_factory=Record)
    marks: Marks = field(default_factory=dict)  # of what ran on accelerators

    def again(self, device: torch.device) -> Again:
        """What lets cells on `device` run again; it does not keep this alive."""
        return partial(_again, self.randomness[device], self.batchnorms)


@contextmanager
def _again(randomness: CellRandomness, batchnorms: BatchNorms, cell: int, m: int) -> Iterator[None]:
    with batchnorms.paused(), collect_losses():
        randomness.enter_cell(cell, m)
        yield
