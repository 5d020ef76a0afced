"""Join microbatches of a value, to compare the whole with its parts."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.values import flatten


class UnpairableError(Exception):
    """The two cannot be joined."""


class RaggedError(UnpairableError):
    """They differ along a dimension other than the samples'."""


@dataclass(frozen=True)
class Pair:
    """Parts (mostly two) and their whole; `leaves[i]` are the tensors of part i with gradients."""

    parts: tuple[object, ...]
    whole: object
    leaves: tuple[list[torch.Tensor], ...]
    sizes: tuple[int, ...]  # samples


def paired(
    values: Sequence[object],
    sizes: tuple[int, ...],
    batch_dim: int,
    *,
    most_bytes: int | None,
    num_differentiated: int | None = None,
) -> Pair:
    """Join the values of microbatches, each with as many samples as fit into `most_bytes`.

    Only the first `num_differentiated` leaves require gradients. Raises UnpairableError.
    """
    flat, specs = zip(*map(flatten, values), strict=True)
    if any(spec != specs[0] for spec in specs):
        raise UnpairableError
    columns: list[Sequence[object]] = [*zip(*flat, strict=True)]
    axes = [_axis_of(column, sizes, batch_dim) for column in columns]
    if all(axis is None for axis in axes):
        raise UnpairableError
    if most_bytes is not None and all(
        axis is None or (isinstance(leaf, torch.Tensor) and leaf.shape[axis] == sizes[0])
        for leaf, axis in zip(flat[0], axes, strict=True)
    ):
        size = min(*sizes, _fitting(flat[0], axes, sizes[0], most_bytes))
        columns = [[_narrow(t, x, size) for t in c] for c, x in zip(columns, axes, strict=True)]
        sizes = (size,) * len(sizes)
    leaves: tuple[list[torch.Tensor], ...] = tuple([] for _ in sizes)
    whole: list[object] = []
    for index, axis in enumerate(axes):
        if axis is None:
            whole.append(columns[index][0])
            continue
        is_leaf = num_differentiated is None or index < num_differentiated
        ours = [_leaf(part, is_leaf=is_leaf) for part in columns[index]]
        columns[index] = ours
        for own, leaf in zip(leaves, ours, strict=True):
            if leaf.requires_grad:
                own.append(leaf)
        whole.append(torch.cat(ours, axis))
    parts = (pytree.tree_unflatten(row, specs[0]) for row in zip(*columns, strict=True))
    return Pair(tuple(parts), pytree.tree_unflatten(whole, specs[0]), leaves, sizes)


def halves_of_ragged(values: Sequence[object], num_differentiated: int) -> tuple[Pair, int]:
    """Halve the longer of two microbatches along the dimension in which they differ.

    Also returns that dimension. Raises UnpairableError.
    """
    (first, spec), (second, other) = map(flatten, values)
    if spec != other:
        raise UnpairableError
    axes = [_ragged_axis(a, b) for a, b in zip(first, second, strict=True)]
    lengths = [
        (a.shape[x], b.shape[x])  # type: ignore[attr-defined]
        for a, b, x in zip(first, second, axes, strict=True)
        if x is not None
    ]
    if len(set(lengths)) != 1 or max(lengths[0]) < 2:
        raise UnpairableError
    longer = [*(first if lengths[0][0] > lengths[0][1] else second)]
    half = max(lengths[0]) // 2
    sizes = (half, max(lengths[0]) - half)
    found = next(axis for axis in axes if axis is not None)
    columns: list[tuple[object, ...]] = [
        (leaf, leaf)
        if axis is None
        else tuple(
            _leaf(part, is_leaf=index < num_differentiated)
            for part in torch.split(leaf, sizes, axis)  # type: ignore[arg-type]
        )
        for index, (leaf, axis) in enumerate(zip(longer, axes, strict=True))
    ]
    whole = [
        column[0] if axis is None else torch.cat(column, axis)  # type: ignore[arg-type]
        for column, axis in zip(columns, axes, strict=True)
    ]
    one, two = ([column[i] for column in columns] for i in (0, 1))
    leaves = _inputs(one, axes), _inputs(two, axes)
    parts = pytree.tree_unflatten(one, spec), pytree.tree_unflatten(two, spec)
    return Pair(parts, pytree.tree_unflatten(whole, spec), leaves, sizes), found


def ways_together(
    parts: Sequence[torch.Tensor], shape: torch.Size, sizes: tuple[int, ...], batch_dim: int
) -> Iterator[torch.Tensor]:
    """The ways in which outputs of parts, of `sizes` samples, make one of `shape`.

    Samples may lie along any dimension, and share it with positions, before or behind these.
    """
    if any(part.dim() != len(shape) for part in parts):
        return
    for dim in sorted(range(len(shape)), key=lambda dim: dim != batch_dim):
        rest, lengths = _without(shape, dim), [part.shape[dim] for part in parts]
        if sum(lengths) != shape[dim] or any(_without(part.shape, dim) != rest for part in parts):
            continue
        yield torch.cat([*parts], dim)
        count = lengths[0] // sizes[0]
        if count > 1 and lengths == [count * size for size in sizes]:
            split = [torch.split(part, size, dim) for part, size in zip(parts, sizes, strict=True)]
            yield torch.cat([*itertools.chain(*zip(*split, strict=True))], dim)


def _inputs(part: Sequence[object], axes: Sequence[int | None]) -> list[torch.Tensor]:
    pairs = zip(part, axes, strict=True)
    split = [leaf for leaf, axis in pairs if axis is not None and isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in split if leaf.requires_grad]


def _axis_of(column: Sequence[object], sizes: tuple[int, ...], batch_dim: int) -> int | None:
    """The dimension along which a leaf of all parts is joined; None if it is the same in all."""
    pairs = zip(column[1:], sizes[1:], strict=True)
    found = {_axis(column[0], leaf, (sizes[0], size), batch_dim) for leaf, size in pairs} - {None}
    if len(found) > 1:
        raise UnpairableError
    return found.pop() if found else None


def _axis(one: object, two: object, sizes: tuple[int, int], batch_dim: int) -> int | None:
    """Return the dimension along which two leaves join; None if both are equal."""
    if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
        if type(one) is type(two) and (one is two or repr(one) == repr(two)):
            return None
        raise UnpairableError
    if one.dim() != two.dim() or one.dtype != two.dtype:
        raise UnpairableError
    dims = sorted(range(one.dim()), key=lambda dim: dim != batch_dim)
    fitting = [d for d in dims if _without(one.shape, d) == _without(two.shape, d)]
    for dim in fitting:
        if (one.shape[dim], two.shape[dim]) == sizes:
            return dim
    if one.shape == two.shape and torch.equal(one.detach(), two.detach()):
        return None
    if batch_dim in fitting:  # samples and positions share a dimension
        return batch_dim
    raise RaggedError if one.dim() else UnpairableError


def _ragged_axis(one: object, two: object) -> int | None:
    if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
        return None
    if one.dim() != two.dim():
        raise UnpairableError
    differing = [d for d in range(one.dim()) if one.shape[d] != two.shape[d]]
    if len(differing) > 1:
        raise UnpairableError
    return differing[0] if differing else None


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _narrow(leaf: object, axis: int | None, size: int) -> object:
    return leaf if axis is None else leaf.narrow(axis, 0, size)  # type: ignore[attr-defined]


def _fitting(leaves: Sequence[object], axes: Sequence[int | None], size: int, most: int) -> int:
    taken = sum(
        leaf.nbytes // max(size, 1)
        for leaf, axis in zip(leaves, axes, strict=True)
        if axis is not None and isinstance(leaf, torch.Tensor)
    )
    return max(1, most // max(taken, 1))


def _leaf(tensor: object, *, is_leaf: bool) -> torch.Tensor:
    assert isinstance(tensor, torch.Tensor)
    leaf = tensor.detach()
    differentiable = leaf.is_floating_point() or leaf.is_complex()
    return leaf.requires_grad_() if is_leaf and differentiable else leaf
