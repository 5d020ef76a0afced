"""Arguments by name: parts of the batch that go straight to the cells whose `forward` names them.

Every cell is given tensors of its own: what it changes in place no other cell sees, and the sum
of its gradients does not depend on where the chain is cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stagewise.batch.markers import Arguments
from stagewise.batch.values import Structure, put_together, take_apart
from stagewise.engine.stage.call import Call
from stagewise.errors import BatchError
from stagewise.model.cell import Chain


@dataclass(frozen=True)
class CellKeywords:
    """One cell's arguments by name for one microbatch."""

    cell: int
    structure: Structure
    tensors: list[torch.Tensor]  # the caller's
    gradients: list[torch.Tensor | None]  # of `tensors`, once the graph ran backward
    places: range  # of `tensors` among all that the stage feeds its cells

    def values(self, fed: Sequence[torch.Tensor]) -> dict[str, object]:
        """The arguments, made of the stage's own tensors."""
        return put_together(fed[self.places.start : self.places.stop], self.structure)  # type: ignore[return-value]


def keywords_of(cells: Chain, m: int, call: Call, *, first_place: int) -> list[CellKeywords]:
    """What `cells` are given by name in microbatch m; gradients will stand in `call` too."""
    given, place = [], first_place
    for cell in cells:
        names = cell.keywords(call.num_args if cell.index == 0 else 1)
        own = {name: call.keywords[m][name] for name in names if name in call.keywords[m]}
        if not own:
            continue
        tensors, structure = take_apart(own)
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        places = range(place, place + len(tensors))
        place = places.stop
        call.keyword_gradients[m, -cell.index] = tensors, gradients
        given.append(CellKeywords(cell.index, structure, tensors, gradients, places))
    return given


def invoke(module: nn.Module, value: object, keywords: Mapping[str, object]) -> object:
    """Call a cell with what the one before it returned."""
    if isinstance(value, Arguments):
        return module(*value.args, **{**keywords, **value.kwargs})
    return module(value, **keywords) if keywords else module(value)


def take_targets(targets: Sequence[object], call: Call) -> None:
    """Give the loss its targets, as leaves of their own where they require gradients.

    The microbatches' graphs would else meet in the caller's, which can run backward just once.
    """
    for target in targets:
        tensors, structure = take_apart(target)
        leaves = [t.detach().requires_grad_() if t.requires_grad else t for t in tensors]
        pairs = zip(tensors, leaves, strict=True)
        call.target_leaves += [(tensor, leaf) for tensor, leaf in pairs if leaf is not tensor]
        call.targets.append(put_together(leaves, structure))


def batch_gradients(call: Call) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(the caller's tensor, a gradient for it) in an order that no cut or schedule changes."""
    for m in sorted(call.input_gradients):
        tensors, _ = take_apart(call.inputs[m])
        yield from _wanted(tensors, call.input_gradients[m])
    for key in sorted(call.keyword_gradients):
        yield from _wanted(*call.keyword_gradients[key])
    for tensor, leaf in call.target_leaves:
        yield from _wanted([tensor], [leaf.grad])


def _wanted(
    tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if tensor.requires_grad and gradient is not None:
            yield tensor, gradient.to(tensor.device)


NOT_GIVEN = -1


class Takers:
    """For every name that some cell's `forward` has: the stages and ranks that take it.

    `stage_ranks[s]` are the ranks that run stage s. Every rank knows the names of all cells, but
    holds none of the cells: those of other ranks' stages would stay alive here.
    """

    def __init__(
        self, chain: Chain, balance: Sequence[int], stage_ranks: Sequence[Sequence[int]]
    ) -> None:
        self._takes = [cell.takes for cell in chain]
        self.cut(balance, stage_ranks)
        self.names = sorted({name for cell in chain for name in cell.keywords(cell.index and 1)})

    def cut(self, balance: Sequence[int], stage_ranks: Sequence[Sequence[int]]) -> None:
        """From now on the chain is cut by `balance`."""
        self._stages = [s for s, num_cells in enumerate(balance) for _ in range(num_cells)]
        self._stage_ranks = stage_ranks

    def ranks(self, name: str, num_args: int) -> list[int]:
        """The ranks that need `name` where the first cell gets `num_args` positional arguments."""
        stages = {stage for _, stage in self.cells(name, num_args)}
        return sorted({rank for stage in stages for rank in self._stage_ranks[stage]})

    def cells(self, name: str, num_args: int) -> list[tuple[int, int]]:
        """The (cell, stage) pairs that need it, in order of the chain."""
        return [
            (index, self._stages[index])
            for index, takes in enumerate(self._takes)
            if name in takes.beside(num_args if index == 0 else 1)
        ]

    def starts_by_name(self, keywords: Mapping[str, object]) -> bool:
        """Whether `keywords` hold the first cell's first argument, which then needs no inputs."""
        return any(name in keywords for name in self._takes[0].beside(0)[:1])

    def check_known(self, keywords: Mapping[str, object]) -> None:
        """Raise BatchError for a keyword that no cell takes."""
        for name in keywords:
            if name not in self.names:
                raise self._unknown(name)

    def check_given(self, columns: Sequence[Sequence[int]], num_args: int) -> None:
        """Raise BatchError if some rank lacks what it takes: `columns[i][rank]` is NOT_GIVEN."""
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
            f"no cell's forward takes the keyword argument {name!r}{besides}; by name this "
            f"model's cells take: {', '.join(self.names) or 'nothing'} (*args and **kwargs take "
            "none)"
        )
