"""A microbatch in a stage, between its forward and its backward.

Problem: autograd's errors do not say in which cell's backward they were raised, and to note it
beforehand would cost a call of Python's per node. Idea: nodes are numbered as they are made, so the
numbers at which the cells' forwards began divide them by cell. The engine runs ready nodes from the
highest number down, and frees what a node has saved once it has run; so where it failed can be seen
afterwards. A node written in Python is in the traceback.
"""

import bisect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from stagewise.batch.values import Structure
from stagewise.engine.stage.autograd import run_backward
from stagewise.engine.stage.buffers import BufferKeeper, Saved
from stagewise.engine.stage.same_again import Sampled
from stagewise.model.added_losses import AddedLoss
from stagewise.model.cell import Cell, Chain


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
    # The next node's number as each cell began, and at the last one's end; again if recomputed.
    starts: list[int] = field(default_factory=list)


def starts_gradients(flight: Flight, outputs: Sequence[torch.Tensor]) -> bool:
    """Return whether gradients would flow back into the stage, if it had a backward."""
    return any(t.requires_grad for t in (*outputs, *(added.value for added in flight.added)))


@contextmanager
def noting(
    keeper: BufferKeeper,
    flight: Flight,
    batchnorms: AbstractContextManager[object],
    *,
    remember: bool,
) -> Iterator[None]:
    """Run a forward inside: buffers change by microbatch, BatchNorm's by minibatch."""
    with keeper.forward(remember=remember) as flight.buffers, batchnorms:
        yield


def failed_in_backward(error: BaseException, cells: Chain) -> str:
    """Name the cell, or the loss, in whose backward `error` was raised; "" if that is not known."""
    try:
        return _failed_in_backward(error, cells)
    except (RuntimeError, AttributeError, TypeError):  # `error` matters more than its cell
        return ""


def _failed_in_backward(error: BaseException, cells: Chain) -> str:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [number for number, f in enumerate(frames) if f.f_code is run_backward.__code__]
    flights = [f for frame in frames if isinstance(f := frame.f_locals.get("flight"), Flight)]
    if not places or not flights or not flights[-1].starts:
        return ""
    flight, inside = flights[-1], frames[places[-1] + 1 :]
    own = [frame.f_locals.get("self") for frame in inside]
    written = [node for node in own if isinstance(node, BackwardCFunction)]
    if written:
        return _name(flight, cells, {int(written[0]._sequence_nr())})
    ran_on = frames[places[-1]].f_locals["keep_graph"]  # nothing was freed
    ran, failed = (set(), set()) if ran_on else _around_failure(flight.roots)
    hooked = list(_with_hook(cells, {frame.f_code for frame in inside}))
    if hooked:  # of a parameter, whose node runs right after the one that needs it
        return hooked[0].in_words if len(hooked) == 1 else _name(flight, cells, ran)
    return _name(flight, cells, failed)


def _name(flight: Flight, cells: Chain, numbers: set[int]) -> str:
    """Name the only cell, or the loss, to which the nodes of these numbers belong."""
    found = {bisect.bisect_right(flight.starts, number) - 1 for number in numbers}
    if len(found) != 1 or (place := found.pop()) < 0:
        return ""
    place %= len(cells) + 1
    return "the loss" if place == len(cells) else cells[place].in_words


def _around_failure(roots: Sequence[GradientEdge | None]) -> tuple[set[int], set[int]]:
    """Return the numbers of the last node that has run, and of those that may have failed."""
    nodes, todo = set[Node](), [edge.node for edge in roots if edge is not None]
    while todo:
        if (node := todo.pop()) not in nodes and not hasattr(node, "variable"):
            nodes.add(node)
            todo += [child for child, _ in node.next_functions if child is not None]
    in_order = sorted(nodes, key=lambda node: -node._sequence_nr())
    states = [*map(_is_freed, in_order)]
    first = max((place + 1 for place, freed in enumerate(states) if freed), default=0)
    end = next((p + 1 for p in range(first, len(states)) if states[p] is False), len(states))
    numbers = [int(node._sequence_nr()) for node in in_order]
    return set(numbers[first - 1 : first] if first else []), set(numbers[first:end])


def _is_freed(node: Node) -> bool | None:
    """Return whether what `node` saved was freed; None if it has saved nothing."""
    known = None
    for name in filter(lambda name: name.startswith("_raw_saved"), dir(node)):
        try:
            saved: Any = getattr(node, name)
            for one in saved if isinstance(saved, tuple) else [saved]:
                one.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
            known = False
        except RuntimeError as error:
            if "freed" in str(error):
                return True
    return known


def _with_hook(cells: Chain, codes: set[CodeType]) -> Iterator[Cell]:
    """Yield the cells that have a parameter with a hook of these `codes`."""
    for cell in cells:
        for parameter in cell.module.parameters():
            own: Any = parameter
            hooks = [*(own._backward_hooks or {}).values()]
            hooks += (own._post_accumulate_grad_hooks or {}).values()
            if any(hook.__code__ in codes for hook in hooks if hasattr(hook, "__code__")):
                yield cell
                break
