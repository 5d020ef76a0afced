"""Which weight gradients a split backward can put off, and what it must keep until then.

Those of linear layers, convolutions, embeddings and matrix products with a parameter: the node
of the graph next to the parameter (views between them aside) needs its incoming gradient and what
it saved, and nobody waits for its result.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch.autograd.graph import Node

from stagewise.batch.layouts import storages
from stagewise.engine.stage.split_backward import PRODUCTS

_VIEWS = {"TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0"} | {
    "UnsafeViewBackward0",
    "ExpandBackward0",
    "ToCopyBackward0",
    "ReshapeAliasBackward0",
}


def deferred_by(
    roots: Iterable[torch.Tensor], own: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], int]:
    """The parameters whose gradients wait for `W` in the graph of `roots`, and the bytes kept.

    `own` are the parameters and buffers, which are kept anyway.
    """
    waiting: dict[int, torch.Tensor] = {}
    at_once: set[int] = set()
    kept: dict[int, int] = {}
    held = {storage._cdata for tensor in own for storage in storages(tensor)}
    known = {id(tensor) for tensor in own}
    for node in _nodes(root.grad_fn for root in roots):
        if _kind(node) in _VIEWS:
            continue
        parameters = [leaf for leaf in _leaves_of(node) if id(leaf) in known]
        if _kind(node).removesuffix("Backward0") not in PRODUCTS:
            at_once |= {id(parameter) for parameter in parameters}
        elif parameters:
            waiting |= {id(parameter): parameter for parameter in parameters}
            kept[-id(node)] = sum(
                part.dtype.itemsize * torch.Size(part.shape).numel()
                for part in node._input_metadata
            )
            for tensor in _saved_by(node):
                for storage in storages(tensor):
                    if storage._cdata not in held:
                        kept[storage._cdata] = storage.nbytes()
    deferred = [parameter for key, parameter in waiting.items() if key not in at_once]
    return deferred, sum(kept.values()) if deferred else 0


def _nodes(starts: Iterable[Node | None]) -> Iterator[Node]:
    """All nodes of the graph, each once."""
    stack, seen = [node for node in starts if node is not None], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack += [following for following, _ in node.next_functions if following is not None]


def _leaves_of(node: Node) -> Iterator[torch.Tensor]:
    """The leaves that `node` has for inputs, directly or through views."""
    for following, _ in node.next_functions:
        if following is None:
            continue
        if _kind(following) == "AccumulateGrad":
            yield following.variable  # type: ignore[attr-defined]
        elif _kind(following) in _VIEWS:
            yield from _leaves_of(following)


def _saved_by(node: Node) -> Iterator[torch.Tensor]:
    names = (name for name in dir(node) if name.startswith("_saved_"))
    values = (getattr(node, name) for name in names)
    several = (value if isinstance(value, tuple | list) else (value,) for value in values)
    return (value for value in chain.from_iterable(several) if isinstance(value, torch.Tensor))


def _kind(node: Node) -> str:
    return type(node).__name__
