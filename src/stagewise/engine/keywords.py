"""Arguments by name: parts of the batch that go straight to the cells whose `forward` names them.

Every cell is given tensors of its own: what it changes in place no other cell sees, and the sum
of its gradients does not depend on where the chain is cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stagewise.engine.call import Call
from stagewise.engine.markers import Arguments
from stagewise.engine.values import Structure, put_together, take_apart
from stagewise.model.chain import Chain


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
