"""Split a minibatch into microbatches.

Samples lie along dimension 0 of every tensor, or along the one BatchDim names. Microbatch sizes
differ by at most one (10 samples in 4 microbatches: 3, 3, 2, 2), larger ones first. A tensor
without dimensions, or a part marked Replicated, goes to every microbatch whole; Microbatches are
already split, and the rest of the batch is split into the same sizes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils import _pytree as pytree

from stagewise.batch.lanes import Arrivals
from stagewise.batch.markers import BatchDim, Microbatches, Replicated, is_mark, unmarked
from stagewise.batch.values import flatten, move, with_paths
from stagewise.errors import BatchError, CellError

# A leaf's path, its number of samples (per microbatch if already split), and the leaf.
_Sized = tuple[str, int | tuple[int, ...], torch.Tensor | None]
_Parts = Sequence[Mapping[str, object]]  # of arguments by name, by microbatch


@dataclass(frozen=True)
class Extent:
    """How many samples a batch holds; `sizes` are those of Microbatches in it, if any."""

    num_samples: int | None = None  # None: nothing in it has samples
    sizes: tuple[int, ...] | None = None


def extent(values: Iterable[tuple[str, object]]) -> Extent:
    """Return the extent on which all leaves of `values` agree; BatchError names two that do not."""
    total: tuple[str, int] | None = None
    split_by: tuple[str, tuple[int, ...]] | None = None
    values = tuple(values)
    for what, value in values:
        sized: Iterable[_Sized] = (
            [(what, value.shape[0], value)]
            if isinstance(value, torch.Tensor) and value.dim()
            else _sizes(value, what)
        )
        for name, size, leaf in sized:
            num_samples = size if isinstance(size, int) else sum(size)
            if num_samples == 0:
                raise BatchError(f"{name} has no samples; leave empty batches out")
            total = total or (name, num_samples)
            if num_samples != total[1]:
                raise BatchError(
                    f"{total[0]} has {total[1]} samples but {name} has {num_samples}; every "
                    "tensor of a batch needs the same number of samples along dimension 0, or "
                    "along batch_dim (mark what every microbatch needs whole with "
                    f"stagewise.Replicated){_other_dim(name, leaf, total[1])}"
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
            if not isinstance(value, torch.Tensor | None):
                _refuse_per_sample_items(value, what, total[1])
    return Extent(total and total[1], split_by and split_by[1])


def batch_size(value: object, what: str) -> int:
    """Return the number of samples in `value`; BatchError if there are none, or leaves disagree."""
    size = extent([(what, value)]).num_samples
    if size is None:
        raise BatchError(
            f"{what} holds no tensor with samples; pass a batch with samples along dimension 0"
        )
    return size


def microbatch_sizes(num_samples: int, num_microbatches: int) -> list[int]:
    """Return sizes that differ by at most one; BatchError if some would be empty."""
    if num_microbatches > num_samples:
        raise BatchError(
            f"{num_samples} samples cannot fill {num_microbatches} microbatches; use a larger "
            f"batch, at most {num_samples} microbatches, or a loader with drop_last=True"
        )
    small, extra = divmod(num_samples, num_microbatches)
    return [small + (index < extra) for index in range(num_microbatches)]


def split(value: object, sizes: Sequence[int]) -> list[object]:
    """Return one pytree per microbatch; tensors are views, constants are shared."""
    if isinstance(value, torch.Tensor):
        return _column(value, sizes)
    flatten(value)  # registers dataclasses as nodes
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_mark)
    known: dict[tuple[object, ...], list[object]] = {}  # a tensor in two places stays one tensor
    for leaf in leaves:
        if _identity(leaf) not in known:
            known[_identity(leaf)] = _column(leaf, sizes)
    columns = [known[_identity(leaf)] for leaf in leaves]
    return [
        pytree.tree_unflatten([column[index] for column in columns], spec)
        for index in range(len(sizes))
    ]


def split_on(device: torch.device, value: object, sizes: Sequence[int]) -> Sequence[object]:
    """Return the microbatches of `value` on `device`; on an accelerator they arrive in turn."""
    if device.type == "cpu":
        return split(move(value, device), sizes)
    return Arrivals(split(value, sizes), device)


def named_parts(
    named: Mapping[str, object], sizes: Sequence[int], taken: Mapping[torch.device, Set[str]]
) -> tuple[_Parts, Mapping[torch.device, _Parts]]:
    """Return a dict per microbatch; and, for each device, one of the names `taken` there."""
    if not named:
        return (), {}
    columns = {name: split(value, sizes) for name, value in named.items()}
    parts = [{name: column[m] for name, column in columns.items()} for m in range(len(sizes))]
    return parts, {
        device: Arrivals([{n: part[n] for n in part if n in names} for part in parts], device)
        for device, names in taken.items()
    }


def shares_of_samples(sizes: Sequence[int], total: int | None = None) -> tuple[float, ...]:
    """Return every microbatch's share of `total` samples (default: of their sum)."""
    total = total or sum(sizes)
    return tuple([size / total for size in sizes])


def _identity(leaf: object) -> tuple[object, ...]:
    if isinstance(leaf, BatchDim) and isinstance(leaf.value, torch.Tensor):
        return id(leaf.value), leaf.dim
    return (id(leaf),)


def first_microbatch(value: object, size: int) -> object:
    """Return the first `size` samples of `value`, keeping Replicated marks."""
    flatten(value)  # registers dataclasses as nodes
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_mark)
    first = {
        id(leaf): leaf[:size] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()
    }
    parts = [_first_part(leaf, size) for leaf in leaves]
    return pytree.tree_unflatten([first.get(id(leaf), leaf) for leaf in parts], spec)


def _first_part(leaf: object, size: int) -> object:
    if isinstance(leaf, Microbatches):
        if leaf.sizes is None:
            return leaf.parts[0]
        return Microbatches(leaf.parts[:1], leaf.sizes[:1])
    if isinstance(leaf, BatchDim):
        dim = leaf.dim
        part = pytree.tree_map_only(
            torch.Tensor, lambda t: t.narrow(dim, 0, min(size, t.shape[dim])), leaf.value
        )
        return BatchDim(part, dim)
    return leaf


def _sizes(value: object, what: str) -> Iterator[_Sized]:
    """Yield every leaf that has samples."""
    try:
        flatten(value)
    except CellError as error:
        raise BatchError(f"{what}: {error}") from error
    for path, leaf in with_paths(value, is_mark):
        name = what + path
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            yield name, leaf.shape[0], leaf
        elif isinstance(leaf, BatchDim):
            for inner, tensor in _tensors(leaf.value, name):
                if tensor.dim():
                    yield inner, _samples_along(tensor, leaf.dim, inner), None
        elif isinstance(leaf, Microbatches):
            yield name, _sizes_of_parts(leaf, name), None


def _sizes_of_parts(leaf: Microbatches, name: str) -> tuple[int, ...]:
    if leaf.sizes is not None:
        if len(leaf.sizes) != len(leaf.parts) or not all(size > 0 for size in leaf.sizes):
            raise BatchError(
                f"{name} = Microbatches of {len(leaf.parts)} parts has sizes {list(leaf.sizes)}; "
                "give one number of samples, at least 1, for each part"
            )
        return leaf.sizes
    named = [(f"{name}[{index}]", part) for index, part in enumerate(leaf.parts)]
    extents = [extent([pair]).num_samples for pair in named]
    if not extents or None in extents:
        raise BatchError(
            f"{name} = Microbatches of {len(extents)} parts, of which "
            f"{extents.count(None)} hold no samples; give one pytree per microbatch, "
            "with samples along dimension 0 of its tensors"
        )
    return tuple(size for size in extents if size is not None)


def _tensors(value: object, what: str) -> Iterator[tuple[str, torch.Tensor]]:
    for path, leaf in with_paths(value):
        if isinstance(leaf, torch.Tensor):
            yield what + path, leaf


def _samples_along(tensor: torch.Tensor, dim: int, name: str) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise BatchError(
            f"{name} has shape {tuple(tensor.shape)}, so its samples cannot lie along dimension "
            f"{dim}; give batch_dim another number, or mark this part of the batch with "
            "stagewise.BatchDim(value, dim), or with stagewise.Replicated if every microbatch "
            "needs it whole"
        )
    return tensor.shape[dim]


def _other_dim(name: str, leaf: torch.Tensor | None, num_samples: int) -> str:
    """Return a hint if another dimension of `leaf` has the batch's number of samples."""
    if leaf is None or num_samples not in leaf.shape:
        return ""
    dim = leaf.shape.index(num_samples)
    return (
        f"; dimension {dim} of {name} has {num_samples}: if its samples lie there, mark it with "
        f"stagewise.BatchDim(value, {dim})"
    )


def _refuse_per_sample_items(value: object, what: str, num_samples: int) -> None:
    """Raise BatchError for lists and arrays with one item per sample: they are not split."""
    if num_samples < 2:
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
    """Return the leaf's part for every microbatch."""
    if isinstance(leaf, torch.Tensor) and leaf.dim():
        return list(torch.split(leaf, list(sizes)))
    if isinstance(leaf, Replicated):
        return [leaf.value] * len(sizes)
    if isinstance(leaf, BatchDim):
        return _columns_along(leaf, sizes)
    if isinstance(leaf, Microbatches):
        if leaf.sizes is not None:
            return [unmarked(part) for part in leaf.parts]
        pairs = zip(leaf.parts, sizes, strict=True)
        return [split(part, [size])[0] for part, size in pairs]
    return [leaf] * len(sizes)


def _columns_along(leaf: BatchDim, sizes: Sequence[int]) -> list[object]:
    if isinstance(leaf.value, torch.Tensor):
        if not leaf.value.dim():
            return [leaf.value] * len(sizes)
        return list(torch.split(leaf.value, list(sizes), leaf.dim))
    leaves, spec = pytree.tree_flatten(leaf.value)
    columns = [
        _columns_along(BatchDim(inner, leaf.dim), sizes)
        if isinstance(inner, torch.Tensor)
        else [inner] * len(sizes)
        for inner in leaves
    ]
    return [pytree.tree_unflatten([*parts], spec) for parts in zip(*columns, strict=True)]
