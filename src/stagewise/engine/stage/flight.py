"""A microbatch in a stage, between its forward and its backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import Node

from stagewise.batch.values import Structure
from stagewise.engine.stage.buffers import Saved
from stagewise.engine.stage.same_again import Sampled
from stagewise.model.added_losses import AddedLoss


@dataclass(frozen=True)
class CellKeywords:
    """One cell's arguments by name for one microbatch."""

    cell: int
    structure: Structure
    tensors: list[torch.Tensor]  # the caller's
    gradients: list[torch.Tensor | None]  # of `tensors`, once the graph ran backward
    places: slice  # of `tensors` among all that the stage feeds its cells


@dataclass(slots=True)
class Flight:
    """What a stage keeps of it: the inputs, and while a graph exists, its two ends."""

    inputs: list[torch.Tensor]  # detached leaves; tensors given by name come last
    structure: Structure
    gradients: list[torch.Tensor | None]  # of the inputs, once the graph ran backward
    num_received: int  # of the inputs
    entries: Sequence[Node] = ()  # where the graph begins, at the inputs
    roots: Sequence[torch.Tensor] = ()  # outputs with graph, or the losses
    names: tuple[str, ...] = ()  # of the losses
    added: Sequence[AddedLoss] = ()  # by the cells, with graph
    sampled: Sampled | None = None  # of the outputs, where they are to come out again
    buffers: Saved | None = None
    keywords: Sequence[CellKeywords] = ()
