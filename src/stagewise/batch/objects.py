"""Take apart objects of plain classes that hold tensors, when a model returns them.

A transformers model, for example, returns its key-value cache: torch.export rejects it, and
microbatches' outputs could not be joined. So such an object becomes a pytree node whose children
are its attributes with tensors and numbers; unflattening rebuilds an object of its class.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_DEPTH = 8  # of nested objects; deeper ones are left as they are


class Opened:
    """An object's attributes: `parts`; the `context` holds its class, their names and constants."""

    def __init__(self, context: Any, parts: Iterable[object]) -> None:
        self.context, self.parts = context, list(parts)


def opened(value: object, depth: int = _DEPTH) -> object:
    """Return `value` with objects that hold tensors taken apart; `closed` is the inverse."""
    if isinstance(value, torch.Tensor):
        return value
    return pytree.tree_map(lambda leaf: _opened(leaf, depth), value)


def closed(value: object) -> object:
    """Return `value` with its objects rebuilt, as any tree_map does."""
    return pytree.tree_map(lambda leaf: leaf, value)


def _opened(leaf: object, depth: int) -> object:
    cls = type(leaf)
    if not depth or cls.__new__ is not object.__new__ or isinstance(leaf, nn.Module):
        return leaf
    held = {name: opened(item, depth - 1) for name, item in getattr(leaf, "__dict__", {}).items()}
    if not any(isinstance(part, torch.Tensor) for part in pytree.tree_leaves(held)):
        return leaf
    varies = {name: p for name, p in held.items() if any(map(_is_part, pytree.tree_leaves(p)))}
    rest = tuple((name, item) for name, item in vars(leaf).items() if name not in varies)
    return Opened((cls, tuple(varies), rest), varies.values())


def _is_part(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor | torch.SymInt | int) and not isinstance(leaf, bool)


def _rebuilt(parts: Iterable[object], context: Any) -> object:
    cls, names, rest = context
    made: object = object.__new__(cls)
    made.__dict__.update(rest)
    made.__dict__.update(zip(names, parts, strict=True))
    return made


pytree.register_pytree_node(
    Opened,
    lambda node: (node.parts, node.context),
    _rebuilt,
    serialized_type_name="stagewise.Opened",
    flatten_with_keys_fn=lambda node: (
        [(pytree.GetAttrKey(n), p) for n, p in zip(node.context[1], node.parts, strict=True)],
        node.context,
    ),
)
