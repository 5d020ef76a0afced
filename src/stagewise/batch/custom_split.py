"""Split by the user's own function, for batches without a batch dimension.

A batch of graphs, a tree or a packed sequence must be split by code that knows its form:
`split(args, kwargs, num_microbatches)` gets a call's arguments (a loss's target among `kwargs`)
and returns a pair (args, kwargs) per microbatch. The pairs become Microbatches, so the rest of a
step handles only one form of pre-split batch.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.markers import Microbatches, along
from stagewise.batch.split import extent
from stagewise.errors import BatchError

Arguments = tuple[Sequence[object], Mapping[str, object]]
Split = Callable[[tuple[object, ...], dict[str, object], int], Sequence[Arguments]]
_TARGET = "target"


def split_by(
    split: Split,
    args: tuple[object, ...],
    target: object,
    kwargs: Mapping[str, object],
    num_microbatches: int,
    batch_dim: int,
) -> tuple[tuple[object, ...], object, dict[str, object]]:
    """Return the call's arguments split into Microbatches; BatchError for unusable parts."""
    given = dict(kwargs) if target is None else {**kwargs, _TARGET: target}
    if not args and not given:
        return args, target, dict(kwargs)  # on a rank that needs no part of the batch
    try:
        parts = [(tuple(own), dict(named)) for own, named in split(args, given, num_microbatches)]
    except Exception as error:
        raise BatchError(
            f"split(args, kwargs, {num_microbatches}) failed: {type(error).__name__}: {error}; it "
            "must return a pair (args, kwargs) for every microbatch"
        ) from error
    if not parts or any(len(a) != len(args) or k.keys() != given.keys() for a, k in parts):
        raise BatchError(
            f"split(args, kwargs, {num_microbatches}) returned {len(parts)} parts, some without "
            f"the call's {len(args)} positional arguments and keywords {sorted(given)}; every part "
            "must have the same arguments as the call"
        )
    sizes = [_num_samples(a, k, batch_dim) for a, k in parts]
    positional = tuple(_column([a[i] for a, _ in parts], sizes) for i in range(len(args)))
    named = {name: _column([k[name] for _, k in parts], sizes) for name in given}
    return positional, named.pop(_TARGET, None), named


def _num_samples(args: Sequence[object], kwargs: Mapping[str, object], batch_dim: int) -> int:
    """Count samples in the target if there is one, else in the first tensor of the arguments."""
    first = [kwargs[_TARGET]] if _TARGET in kwargs else [*args, *kwargs.values()]
    for leaf in pytree.tree_leaves(first):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return extent([("a part of split(...)", along(leaf, batch_dim))]).num_samples or 1
    raise BatchError("a part that split(args, kwargs, num_microbatches) returned holds no tensor")


def _column(parts: Sequence[object], sizes: Sequence[int]) -> object:
    """Combine one argument of all microbatches; equal values without tensors stay as they are."""
    if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(list(parts))):
        return Microbatches(parts, sizes)
    if all(part == parts[0] for part in parts):
        return parts[0]
    return Microbatches(parts, sizes)
