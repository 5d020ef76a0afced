"""Arguments by name: parts of the batch that go straight to the cells whose `forward` names them.

Every cell is given tensors of its own: what it changes in place no other cell sees, and the sum
of its gradients does not depend on where the chain is cut.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from stagewise.batch.markers import Arguments
from stagewise.batch.values import leaf_of, put_together, take_apart
from stagewise.engine.stage.flight import CellKeywords, Flight
from stagewise.engine.stage.work import Work
from stagewise.errors import BatchError
from stagewise.model.cell import Chain


def take_keywords(flight: Flight, cells: Chain, m: int, work: Work, device: torch.device) -> None:
    """What `cells` are given by name in microbatch m becomes inputs like those that were received.

    Gradients will stand in the record too.
    """
    given, place, keywords = [], flight.num_received, work.parts.keywords[m]
    for cell in cells:
        names = cell.keywords(work.num_args if cell.index == 0 else 1)
        own = {name: keywords[name] for name in names if name in keywords}
        if not own:
            continue
        tensors, structure = take_apart(own)
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        places = slice(place, place + len(tensors))
        place = places.stop
        work.record.keyword_gradients[m, -cell.index] = tensors, gradients
        given.append(CellKeywords(cell.index, structure, tensors, gradients, places))
        flight.inputs += [leaf_of(tensor.to(device)) for tensor in tensors]
    flight.keywords = given
    flight.gradients += [None] * (place - flight.num_received)


def invoke(module: nn.Module, value: object, keywords: Mapping[str, object]) -> object:
    """Call a cell with what the one before it returned."""
    if isinstance(value, Arguments):
        return module(*value.args, **{**keywords, **value.kwargs})
    return module(value, **keywords) if keywords else module(value)


Leaves = list[tuple[torch.Tensor, torch.Tensor]]  # the caller's tensor, the one in its place


def as_leaves(targets: Sequence[object]) -> tuple[Sequence[object], Leaves]:
    """The loss's targets, as leaves of their own where they require gradients; and these.

    The microbatches' graphs would else meet in the caller's, which can run backward just once.
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
    """What reaches stages past their neighbours' values: arguments by name, and skips.

    For every name that some cell's `forward` has: the stages and ranks that take it.
    `stage_ranks[s]` are the ranks that run stage s; `flows` the stages, no neighbours, between
    which skips travel. Every rank knows the names of all cells, but holds none of the cells: those
    of other ranks' stages would stay alive here.
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
        """From now on the chain is cut by `balance`."""
        self._stages = [s for s, num_cells in enumerate(balance) for _ in range(num_cells)]
        self._stage_ranks, self.flows = stage_ranks, flows

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
