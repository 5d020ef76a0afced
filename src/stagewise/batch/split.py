"""Splitting a minibatch into microbatches, and putting outputs together again.

Samples lie along dimension 0 of every tensor. Microbatch sizes differ by at most one
(10 samples in 4 microbatches: 3, 3, 2, 2), larger ones first. A tensor without dimensions, and
what is marked Replicated, goes to every microbatch whole; Microbatches say themselves how they
are split, and then the rest of the batch follows them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils import _pytree as pytree

from stagewise.batch.markers import Microbatches, Replicated, is_mark
from stagewise.batch.values import flatten, with_paths
from stagewise.errors import BatchError, CellError


@dataclass(frozen=True)
class Extent:
    """How many samples a batch holds; `sizes` is the split that Microbatches in it ask for."""

    num_samples: int | None = None  # None: nothing in it has samples
    sizes: tuple[int, ...] | None = None


def extent(values: Iterable[tuple[str, object]]) -> Extent:
    """What all leaves of `values` (by name) agree on; raises BatchError naming two that do not."""
    total: tuple[str, int] | None = None
    split_by: tuple[str, tuple[int, ...]] | None = None
    values = tuple(values)
    for what, value in values:
        for name, size in _sizes(value, what):
            num_samples = size if isinstance(size, int) else sum(size)
            if num_samples == 0:
                raise BatchError(f"{name} has no samples; leave empty batches out")
            total = total or (name, num_samples)
            if num_samples != total[1]:
                raise BatchError(
                    f"{total[0]} has {total[1]} samples but {name} has {num_samples}; every "
                    "tensor of a batch needs the same length along dimension 0 (mark what "
                    "every microbatch needs whole with stagewise.Replicated)"
                )
            if isinstance(size, tuple):
                split_by = split_by or (name, size)
                if size != split_by[1]:
                    raise BatchError(
                        f"{split_by[0]} has microbatches of {list(split_by[1])} samples but "
                        f"{name} of {list(size)}; split both alike"
                    )
    if total is not None:
        for what, value in values:
            _refuse_per_sample_items(value, what, total[1])
    return Extent(total and total[1], split_by and split_by[1])


def batch_size(value: object, what: str) -> int:
    """Number of samples in `value`; raises BatchError if there are none, or leaves disagree."""
    size = extent([(what, value)]).num_samples
    if size is None:
        raise BatchError(
            f"{what} holds no tensor with samples; pass a batch with samples along dimension 0"
        )
    return size


def microbatch_sizes(num_samples: int, num_microbatches: int) -> list[int]:
    """Sizes that differ by at most one; raises BatchError if some would be empty."""
    if num_microbatches > num_samples:
        raise BatchError(
            f"{num_samples} samples cannot fill {num_microbatches} microbatches; use a larger "
            f"batch, at most {num_samples} microbatches, or a loader with drop_last=True"
        )
    small, extra = divmod(num_samples, num_microbatches)
    return [small + (index < extra) for index in range(num_microbatches)]


def split(value: object, sizes: Sequence[int]) -> list[object]:
    """One pytree per microbatch; tensors are views, constants are shared."""
    if isinstance(value, torch.Tensor):
        return _column(value, sizes)
    flatten(value)  # makes dataclasses nodes
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_mark)
    known: dict[int, list[object]] = {}  # a tensor in two places stays one
    for leaf in leaves:
        if id(leaf) not in known:
            known[id(leaf)] = _column(leaf, sizes)
    columns = [known[id(leaf)] for leaf in leaves]
    return [
        pytree.tree_unflatten([column[index] for column in columns], spec)
        for index in range(len(sizes))
    ]


def first_microbatch(value: object, size: int) -> object:
    """The first `size` samples of `value`, in which what is Replicated is still marked so."""
    flatten(value)  # makes dataclasses nodes
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_mark)
    first = {
        id(leaf): leaf[:size] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()
    }
    parts = [leaf.parts[0] if isinstance(leaf, Microbatches) else leaf for leaf in leaves]
    return pytree.tree_unflatten([first.get(id(leaf), leaf) for leaf in parts], spec)


def join(values: Sequence[object], sizes: Sequence[int]) -> object:
    """Concatenate the microbatches' outputs along dimension 0; constants must be equal.

    Raises BatchError where an output does not hold its microbatch's samples along dimension 0.
    """
    flat = [flatten(value) for value in values]
    if any(spec != flat[0][1] for _, spec in flat):
        raise BatchError(
            "the outputs of the microbatches are nested differently, so they cannot be joined; "
            "let the last cell return the same structure always"
        )
    paths = [path for path, _ in with_paths(values[0])]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [_joined(f"output{p}", c, sizes) for p, c in zip(paths, columns, strict=True)]
    return pytree.tree_unflatten(joined, flat[0][1])


def _joined(name: str, column: Sequence[object], sizes: Sequence[int]) -> object:
    parts = [leaf for leaf in column if isinstance(leaf, torch.Tensor)]
    if not parts:
        if not all(leaf is column[0] or repr(leaf) == repr(column[0]) for leaf in column):
            raise BatchError(
                f"{name} is no tensor and differs between microbatches: {list(column)}; let the "
                "last cell return one number per sample, in a tensor"
            )
        return column[0]
    shapes = [tuple(part.shape) for part in parts]
    if [shape[:1] for shape in shapes] != [(size,) for size in sizes] or (
        len({shape[1:] for shape in shapes}) > 1
    ):
        raise BatchError(
            f"{name} has shapes {shapes}, which cannot be joined to one of {sum(sizes)} samples: "
            f"dimension 0 must hold the microbatch's samples ({list(sizes)}) and the other "
            "dimensions must agree; let the last cell return the samples' outputs, and "
            "the loss function reduce them"
        )
    return torch.cat(parts)


def _sizes(value: object, what: str) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """(path, number of samples) of every leaf that has samples; one number per microbatch where
    the leaf is split already."""
    if isinstance(value, torch.Tensor):
        if value.dim():
            yield what, value.shape[0]
        return
    try:
        flatten(value)
    except CellError as error:
        raise BatchError(f"{what}: {error}") from error
    for path, leaf in with_paths(value, is_mark):
        name = what + path
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            yield name, leaf.shape[0]
        elif isinstance(leaf, Microbatches):
            named = [(f"{name}[{index}]", part) for index, part in enumerate(leaf.parts)]
            extents = [extent([pair]).num_samples for pair in named]
            if not extents or None in extents:
                raise BatchError(
                    f"{name} = Microbatches of {len(extents)} parts, of which "
                    f"{extents.count(None)} hold no samples; give it one pytree per microbatch, "
                    "with samples along dimension 0 of its tensors"
                )
            yield name, tuple(size for size in extents if size is not None)


def _refuse_per_sample_items(value: object, what: str, num_samples: int) -> None:
    """Raise BatchError for lists and arrays of one item per sample: they would not be split."""
    if isinstance(value, torch.Tensor) or num_samples < 2:
        return

    def is_leaf(node: object) -> bool:
        return is_mark(node) or _per_sample(node, num_samples)

    for path, leaf in with_paths(value, is_leaf):
        if _per_sample(leaf, num_samples):
            raise BatchError(
                f"{what}{path} is a {type(leaf).__name__} of {num_samples} items, "
                "one for each sample, which cannot be split; make it a tensor, or, if every "
                "microbatch needs it whole, mark it with stagewise.Replicated"
            )


def _per_sample(node: object, num_samples: int) -> bool:
    if isinstance(node, np.ndarray):
        return bool(node.shape[:1] == (num_samples,))
    return (
        isinstance(node, list)
        and len(node) == num_samples
        and all(isinstance(item, str | int | float | complex) for item in node)
    )


def _column(leaf: object, sizes: Sequence[int]) -> list[object]:
    """The leaf's part for every microbatch."""
    if isinstance(leaf, torch.Tensor) and leaf.dim():
        return list(torch.split(leaf, list(sizes)))
    if isinstance(leaf, Replicated):
        return [leaf.value] * len(sizes)
    if isinstance(leaf, Microbatches):
        pairs = zip(leaf.parts, sizes, strict=True)
        return [split(part, [size])[0] for part, size in pairs]
    return [leaf] * len(sizes)
