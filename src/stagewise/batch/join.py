"""The outputs of microbatches, put together: samples in order, and numbers as a loss counts.

A number has no samples. It is the loss of a model that computes its own, or something like it, and
counts as the microbatches' losses do; that this is right, calls look for at the first prediction.
"""

from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.objects import opened
from stagewise.batch.values import flatten, with_paths
from stagewise.errors import BatchError


def join(
    values: Sequence[object],
    sizes: Sequence[int],
    dim: int = 0,
    shares: Sequence[float] | None = None,
) -> object:
    """Concatenate the microbatches' outputs along `dim`; constants must be equal.

    A number, as the loss of a model that computes its own, is summed by `shares` (by default, of
    the samples). Raises BatchError where an output does not hold its microbatch's samples.
    """
    flat = [flatten(opened(value)) for value in values]
    if any(spec != flat[0][1] for _, spec in flat):
        raise BatchError(
            "the outputs of the microbatches are nested differently, so they cannot be joined; "
            "let the last cell return the same structure always"
        )
    paths = [path for path, _ in with_paths(opened(values[0]))]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    shares = [size / sum(sizes) for size in sizes] if shares is None else shares
    joined = [
        _summed(column, shares)
        if all(_is_number(leaf) for leaf in column)
        else _joined(f"output{path}", column, sizes, dim)
        for path, column in zip(paths, columns, strict=True)
    ]
    return pytree.tree_unflatten(joined, flat[0][1])


def _is_number(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and not leaf.dim() and leaf.is_floating_point()


def _summed(numbers: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    if all(torch.equal(number, numbers[0]) for number in numbers) and sum(shares) <= 1:
        return numbers[0]
    return torch.stack([n * share for n, share in zip(numbers, shares, strict=True)]).sum()


def _joined(name: str, column: Sequence[object], sizes: Sequence[int], dim: int) -> object:
    parts = [leaf for leaf in column if isinstance(leaf, torch.Tensor)]
    if not parts:
        if not all(leaf is column[0] or repr(leaf) == repr(column[0]) for leaf in column):
            raise BatchError(
                f"{name} is no tensor and differs between microbatches: {list(column)}; let the "
                "last cell return one number per sample, in a tensor"
            )
        return column[0]
    shapes = [tuple(part.shape) for part in parts]
    if [shape[dim : dim + 1] for shape in shapes] != [(size,) for size in sizes] or (
        len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1
    ):
        raise BatchError(
            f"{name} has shapes {shapes}, which cannot be joined to one of {sum(sizes)} samples: "
            f"dimension {dim} must hold the microbatch's samples ({list(sizes)}) and the other "
            "dimensions must agree; let the last cell return the samples' outputs, and "
            "the loss function reduce them, or give Pipeline a merge(outputs)"
        )
    return torch.cat(parts, dim)
