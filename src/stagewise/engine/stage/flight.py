"""A microbatch in a stage, between its forward and its backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import GradientEdge, Node

from stagewise.batch.values import Structure
from stagewise.engine.stage.buffers import Saved
from stagewise.engine.stage.same_again import Sampled
from stagewise.model.added_losses import AddedLoss


@dataclass(frozen=True)
class CellKeywords:
    """One cell's keyword arguments for one microbatch."""

    cell: int
    structure: Structure
    tensors: list[torch.Tensor]  # the caller's
    gradients: list[torch.Tensor | None]  # of `tensors`, after backward
    places: slice  # of `tensors` among the stage's inputs


@dataclass(slots=True)
class Flight:
    """What a stage keeps of one microbatch: its inputs and, while a graph exists, its two ends.

    Of an output it keeps only the edge that leads to the graph: once sent, its memory is free,
    unless the graph itself saved it.
    """

    inputs: list[torch.Tensor]  # detached leaves, keyword arguments last
    structure: Structure
    gradients: list[torch.Tensor | None]  # of the inputs, after backward
    num_received: int  # inputs that are not keyword arguments
    entries: Sequence[Node] = ()  # where the graph begins, at the inputs
    roots: Sequence[GradientEdge | None] = ()  # of the outputs or the losses; None: no gradient
    ends: Sequence[torch.Tensor] = ()  # on the last stage: the losses, else the outputs
    names: tuple[str, ...] = ()  # of the losses
    added: Sequence[AddedLoss] = ()  # by the cells, with graph
    sampled: Sampled | None = None  # of the outputs, to compare with the recomputation's
    buffers: Saved | None = None
    keywords: Sequence[CellKeywords] = ()
