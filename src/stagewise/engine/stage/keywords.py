"""Keyword arguments: parts of the batch that go straight to the cells whose `forward` names them.

Every cell gets its own tensors: no other cell sees its in-place changes, and the order in which
gradients are summed does not depend on where the chain is cut.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from stagewise.batch.markers import Arguments
from stagewise.batch.values import leaf_of, put_together, take_apart
from stagewise.engine.stage.flight import CellKeywords, Flight
from stagewise.engine.stage.work import CellForward, StageGiven, Work
from stagewise.engine.watch.now import NOW
from stagewise.errors import BatchError, CellError
from stagewise.model.cell import Cell, Chain, Together
from stagewise.schedule import Instruction


def take_keywords(flight: Flight, cells: Chain, m: int, work: Work, device: torch.device) -> None:
    """Append the keyword arguments of `cells` in microbatch m to the flight's inputs.

    Their gradients are entered in the record as well.
    """
    given, place, keywords = [], flight.num_received, work.parts.keywords[m]
    arrived = work.parts.arrived.get(device)
    there = keywords if arrived is None else arrived[m]
    for cell in cells:
        names = cell.keywords(work.num_args if cell.index == 0 else 1)
        own = {name: keywords[name] for name in names if name in keywords}
        if not own:
            continue
        tensors, structure = take_apart(own)
        moved = tensors if arrived is None else take_apart({name: there[name] for name in own})[0]
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        places = slice(place, place + len(tensors))
        place = places.stop
        work.record.keyword_gradients[m, -cell.index] = tensors, gradients
        given.append(CellKeywords(cell.index, structure, tensors, gradients, places))
        flight.inputs += [leaf_of(tensor.to(device)) for tensor in moved]
    flight.keywords = given
    flight.gradients += [None] * (place - flight.num_received)


def names_taken(stages: Iterable[tuple[Chain, torch.device]]) -> dict[torch.device, set[str]]:
    """Return the names of the arguments that cells on each accelerator take by name."""
    taken: dict[torch.device, set[str]] = {}
    for cells, device in stages:
        if device.type != "cpu":
            names = (name for cell in cells for name in cell.keywords(cell.index and 1))
            taken.setdefault(device, set()).update(names)
    return taken


def given_of(flight: Flight) -> StageGiven:
    """What the cells of a stage are given, before any of them changes it."""
    named = {
        given.cell: put_together(flight.inputs[given.places], given.structure)
        for given in flight.keywords
    }
    return put_together(flight.inputs, flight.structure), named  # type: ignore[return-value]


def asks_by_name(flight: Flight) -> bool:
    """Return whether a keyword argument requires gradients, which are summed cell by cell."""
    return any(t.requires_grad for given in flight.keywords for t in given.tensors)


def in_one_call(
    cells: Chain, together: Together, enter: Callable[[Cell], object]
) -> tuple[Cell, CellForward]:
    """Return the first cell with the forward of all, which enters each of the others in order."""
    first = entered = cells[0].index

    def enter_until(index: int) -> None:
        nonlocal entered
        while entered < index:
            entered += 1
            enter(cells[entered - first])

    def forward(value: object, keywords: Mapping[str, object]) -> object:
        output = invoke(partial(together, enter_until), value, keywords)
        enter_until(cells[-1].index)  # those that the model has skipped
        return output

    return cells[0], forward


def invoke(module: Callable[..., object], value: object, keywords: Mapping[str, object]) -> object:
    """Call a cell with the output of the one before it."""
    if isinstance(value, Arguments):
        return module(*value.args, **{**keywords, **value.kwargs})
    return module(value, **keywords) if keywords else module(value)


def run_cell(cell: Cell, value: object, keywords: Mapping[str, object]) -> object:
    """Call a cell with the output of the one before it."""
    return invoke(cell.module, value, keywords)


def failed(
    cell: Cell | None,
    error: Exception,
    instruction: Instruction,
    device: torch.device,
    work: Work,
) -> CellError:
    """Return the error to raise for one of a cell, or of the loss (None)."""
    what = "loss" if cell is None else cell.in_words
    return CellError(
        f"{what} failed on microbatch {instruction.microbatch}: {type(error).__name__}: {error}"
        f"{_cut_arguments(cell, error, work)}\n(instruction {instruction} on stage "
        f"{instruction.stage}, device {device}{NOW.beside()})"
    )


def _cut_arguments(cell: Cell | None, error: Exception, work: Work) -> str:
    """A sentence on the arguments of a cell that failed which microbatches do not share."""
    if (
        cell is None
        or not isinstance(error, _BY_SHAPE)
        or isinstance(error, torch.OutOfMemoryError)
    ):
        return ""
    names = cell.keywords(work.num_args if cell.index == 0 else 1)
    parts = [{name: part[name] for name in names if name in part} for part in work.parts.keywords]
    if cell.index == 0 and isinstance(work.parts.inputs, list):
        given = [value.args if isinstance(value, Arguments) else () for value in work.parts.inputs]
        more = [dict(zip(cell.takes.positional[1:], args[1:], strict=False)) for args in given]
        none: dict[str, object] = {}
        parts = [one | two for one, two in itertools.zip_longest(parts, more, fillvalue=none)]
    if len(parts) < 2:
        return ""
    first, second = ([take_apart(value)[0] for value in part.values()] for part in parts[:2])
    pairs = zip(parts[0], first, second, strict=True)
    cut = [name for name, one, two in pairs if any(map(operator.is_not, one, two))]
    if not cut:
        return ""
    return (
        f"\n(arguments that were cut along the batch, by their size: {', '.join(cut)}; mark with "
        "stagewise.Replicated what every microbatch needs whole, such as a table)"
    )


_BY_SHAPE = RuntimeError, ValueError, IndexError, AssertionError  # what wrong sizes raise
Leaves = list[tuple[torch.Tensor, torch.Tensor]]  # (the caller's tensor, the leaf in its place)


def as_leaves(targets: Sequence[object]) -> tuple[Sequence[object], Leaves]:
    """Replace targets that require gradients by leaves; return the targets and those leaves.

    Otherwise the microbatches' graphs would share the caller's, which can run backward only once.
    """
    given, pairs = list[object](), Leaves()
    for target in targets:
        tensors, structure = take_apart(target)
        if any([tensor.requires_grad for tensor in tensors]):
            leaves = [t.detach().requires_grad_() if t.requires_grad else t for t in tensors]
            pairs += [(t, leaf) for t, leaf in zip(tensors, leaves, strict=True) if leaf is not t]
            target = put_together(leaves, structure)
        given.append(target)
    return given, pairs


NOT_GIVEN = -1


class Routes:
    """What reaches stages other than from their neighbours: keyword arguments and skips.

    Holds, for every keyword of some cell's `forward`, the stages and ranks that take it.
    `stage_ranks[s]` are the ranks that run stage s, `flows` the pairs of non-adjacent stages
    between which skips travel. Every rank knows the keywords of all cells but keeps no cell, which
    would keep other ranks' stages alive.
    """

    def __init__(
        self,
        chain: Chain,
        balance: Sequence[int],
        stage_ranks: Sequence[Sequence[int]],
        flows: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._takes = [cell.takes for cell in chain]
        self.cut(balance, stage_ranks, flows)
        self.names = sorted({name for cell in chain for name in cell.keywords(cell.index and 1)})

    def cut(
        self,
        balance: Sequence[int],
        stage_ranks: Sequence[Sequence[int]],
        flows: Sequence[tuple[int, int]],
    ) -> None:
        """Cut the chain by `balance` from now on."""
        self._stages = [s for s, num_cells in enumerate(balance) for _ in range(num_cells)]
        self._stage_ranks, self.flows = stage_ranks, flows

    def ranks(self, name: str, num_args: int) -> list[int]:
        """Return the ranks that take `name` if the first cell gets `num_args` positional ones."""
        stages = {stage for _, stage in self.cells(name, num_args)}
        return sorted({rank for stage in stages for rank in self._stage_ranks[stage]})

    def cells(self, name: str, num_args: int) -> list[tuple[int, int]]:
        """Return the (cell, stage) pairs that take it, in chain order."""
        return [
            (index, self._stages[index])
            for index, takes in enumerate(self._takes)
            if name in takes.beside(num_args if index == 0 else 1)
        ]

    def starts_by_name(self, keywords: Mapping[str, object]) -> bool:
        """Return whether `keywords` hold the first cell's first argument (no inputs needed)."""
        return any(name in keywords for name in self._takes[0].beside(0)[:1])

    def check_known(self, keywords: Mapping[str, object]) -> None:
        """Raise BatchError for a keyword that no cell takes."""
        for name in keywords:
            if name not in self.names:
                raise self._unknown(name)

    def check_given(self, columns: Sequence[Sequence[int]], num_args: int) -> None:
        """Raise BatchError if a rank lacks a keyword it takes: `columns[i][rank]` is NOT_GIVEN."""
        for name, column in zip(self.names, columns, strict=True):
            if all(mark == NOT_GIVEN for mark in column):
                continue
            needing = self.ranks(name, num_args)
            if not needing:
                raise self._unknown(name, " besides its positional argument")
            without = [rank for rank in needing if column[rank] == NOT_GIVEN]
            if without:
                raise BatchError(
                    f"ranks {without} need the keyword argument {name!r} but got none, though "
                    f"other ranks got it; pass it on ranks {needing}, whose cells take it"
                )

    def _unknown(self, name: str, besides: str = "") -> BatchError:
        return BatchError(
            f"no cell's forward takes the keyword argument {name!r}{besides}; this model's cells "
            f"take by name: {', '.join(self.names) or 'nothing'} (*args and **kwargs do not count)"
        )
