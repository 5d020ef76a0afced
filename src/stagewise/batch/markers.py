"""Marks on a batch: parts that are not samples along dimension 0, and several arguments of a cell.

Marks are pytree nodes, so that any tree traversal finds the tensors inside. A `batch_dim` for a
whole batch becomes a BatchDim around each of its tensors, so splitting handles only marks.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.values import flatten
from stagewise.errors import CellError

_Keyed = tuple[pytree.KeyEntry, object]


class Replicated:
    """A part of a batch that every microbatch gets whole: a table, a temperature, a mask.

    `value` is any pytree. A tensor without dimensions needs no mark. If it requires a gradient, it
    gets the sum over the microbatches, as in the plain model.

    Example:
        >>> import torch, stagewise
        >>> batch = {"x": torch.ones(8, 3), "table": stagewise.Replicated(torch.ones(5))}
    """

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Replicated({self.value!r})"


class BatchDim:
    """A part of a batch whose samples lie along dimension `dim` of its tensors.

    `value` is any pytree. For a whole batch give `batch_dim` to Pipeline, or to the call.

    Example:
        >>> import torch, stagewise
        >>> state = torch.zeros(2, 8, 16)  # (layers, samples, hidden), as nn.LSTM takes it
        >>> batch = {"x": torch.ones(8, 5, 3), "state": stagewise.BatchDim(state, 1)}
    """

    def __init__(self, value: object, dim: int) -> None:
        self.value, self.dim = value, dim

    def __repr__(self) -> str:
        return f"BatchDim({self.value!r}, {self.dim})"


class Microbatches:
    """A part of a batch that is already split: one pytree per microbatch, of any lengths.

    The samples lie along dimension 0 of every part's tensors, or along the batch's `batch_dim`; if
    no dimension counts them (graphs of many nodes each), `sizes` does. The rest of the batch is
    split into the same numbers of samples.

    Example:
        >>> import torch, stagewise
        >>> short, long = torch.ones(4, 10), torch.ones(4, 50)
        >>> batch = stagewise.Microbatches([short, long])
    """

    def __init__(self, parts: Iterable[object], sizes: Sequence[int] | None = None) -> None:
        self.parts = tuple(parts)
        self.sizes = None if sizes is None else tuple(sizes)

    def __repr__(self) -> str:
        return f"Microbatches({list(self.parts)!r})"


class Arguments:
    """The arguments of one cell: `cell(*args, **kwargs)` in place of `cell(value)`.

    Pass it as the inputs, or return it from a cell for the next one.

    Example:
        >>> import torch, stagewise
        >>> inputs = stagewise.Arguments(torch.ones(8, 3), mask=torch.ones(8, 3))
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args, self.kwargs = args, kwargs

    def __repr__(self) -> str:
        parts = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return f"Arguments({', '.join(parts)})"


def is_mark(node: object) -> bool:
    """Return whether `node` is a mark that splitting must handle as a whole."""
    return isinstance(node, (Replicated, Microbatches, BatchDim))


def along(value: object, batch_dim: int) -> object:
    """Return `value` with its unmarked tensors marked as having samples along `batch_dim`."""
    if batch_dim == 0:
        return value
    if isinstance(value, Microbatches):
        return Microbatches((along(part, batch_dim) for part in value.parts), value.sizes)
    if isinstance(value, torch.Tensor):
        return BatchDim(value, batch_dim) if value.dim() else value
    try:
        flatten(value)  # registers dataclasses as nodes
    except CellError:  # reported later by `extent`, with its name
        return value
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_mark)
    if len(leaves) == 1 and leaves[0] is value:
        return value
    return pytree.tree_unflatten([along(leaf, batch_dim) for leaf in leaves], spec)


def unmarked(value: object) -> object:
    """Return `value` without marks, as a plain model takes it; of Microbatches, the first."""
    if isinstance(value, Microbatches):
        return unmarked(value.parts[0])
    if isinstance(value, Replicated | BatchDim):
        return unmarked(value.value)
    if isinstance(value, torch.Tensor):
        return value
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_mark)
    if not any(map(is_mark, leaves)):
        return value
    return pytree.tree_unflatten([unmarked(leaf) for leaf in leaves], spec)


def as_one_value(args: tuple[object, ...]) -> object:
    """Combine positional arguments into the one value that enters the chain; None for none."""
    if len(args) > 1:
        return Arguments(*args)
    return args[0] if args else None


def _flatten_arguments(node: Arguments) -> tuple[list[object], tuple[int, tuple[str, ...]]]:
    return [*node.args, *node.kwargs.values()], (len(node.args), tuple(node.kwargs))


def _unflatten_arguments(leaves: Iterable[object], context: object) -> Arguments:
    (num_args, names), values = context, list(leaves)  # type: ignore[misc]
    named = zip(names, values[num_args:], strict=True)  # type: ignore[has-type]
    return Arguments(*values[:num_args], **dict(named))  # type: ignore[has-type]


def _argument_keys(node: Arguments) -> tuple[list[_Keyed], object]:
    positional: list[_Keyed] = [
        (pytree.SequenceKey(index), arg) for index, arg in enumerate(node.args)
    ]
    named: list[_Keyed] = [(pytree.MappingKey(name), arg) for name, arg in node.kwargs.items()]
    return [*positional, *named], _flatten_arguments(node)[1]


def _part_keys(node: Microbatches) -> tuple[list[_Keyed], object]:
    return [(pytree.SequenceKey(index), part) for index, part in enumerate(node.parts)], node.sizes


pytree.register_pytree_node(
    Arguments,
    _flatten_arguments,
    _unflatten_arguments,
    serialized_type_name="stagewise.Arguments",
    flatten_with_keys_fn=_argument_keys,
)
pytree.register_pytree_node(
    Replicated,
    lambda node: ([node.value], None),
    lambda leaves, _: Replicated(*leaves),
    serialized_type_name="stagewise.Replicated",
    flatten_with_keys_fn=lambda node: ([(pytree.GetAttrKey("value"), node.value)], None),
)
pytree.register_pytree_node(
    BatchDim,
    lambda node: ([node.value], node.dim),
    lambda leaves, dim: BatchDim(next(iter(leaves)), dim),
    serialized_type_name="stagewise.BatchDim",
    flatten_with_keys_fn=lambda node: ([(pytree.GetAttrKey("value"), node.value)], node.dim),
)
pytree.register_pytree_node(
    Microbatches,
    lambda node: (list(node.parts), node.sizes),
    lambda leaves, sizes: Microbatches(leaves, sizes),
    serialized_type_name="stagewise.Microbatches",
    flatten_with_keys_fn=_part_keys,
)
