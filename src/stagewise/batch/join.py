"""Join the outputs of microbatches: samples in order, scalars weighted like losses.

A scalar has no samples. It is the loss of a model that computes its own, or the like, and is
weighted like the microbatches' losses; the first prediction checks that this is right.
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

    Scalars, such as a loss that the model computes itself, are summed with weights `shares` (by
    default, of the samples). BatchError if an output does not hold its microbatch's samples.
    """
    flat = [flatten(opened(value)) for value in values]
    if any(spec != flat[0][1] for _, spec in flat):
        raise BatchError(
            "the outputs of the microbatches are nested differently, so they cannot be joined; "
            "the last cell must always return the same structure"
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
                f"{name} is not a tensor and differs between microbatches: {list(column)}; return "
                "one number per sample from the last cell, in a tensor"
            )
        return column[0]
    shapes = [tuple(part.shape) for part in parts]
    if [shape[dim : dim + 1] for shape in shapes] != [(size,) for size in sizes] or (
        len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1
    ):
        raise BatchError(
            f"{name} has shapes {shapes}, which cannot be joined to one of {sum(sizes)} samples: "
            f"dimension {dim} must hold the microbatch's samples ({list(sizes)}) and the other "
            "dimensions must agree; return per-sample outputs from the last cell and reduce them "
            "in the loss function, or give Pipeline a merge(outputs)"
        )
    return torch.cat(parts, dim)
