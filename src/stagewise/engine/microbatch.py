"""Splitting a minibatch into microbatches, and putting outputs together again.

Samples lie along dimension 0 of every tensor. Microbatch sizes differ by at most one
(10 samples in 4 microbatches: 3, 3, 2, 2), larger ones first.
"""

from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

from stagewise.engine.values import flatten, put_together, take_apart
from stagewise.errors import BatchError, CellError


def batch_size(value: object, what: str) -> int:
    """Number of samples in `value`; raises BatchError naming the leaves that disagree."""
    sizes: dict[str, int] = {}
    try:
        flatten(value)
    except CellError as error:
        raise BatchError(f"{what}: {error}") from error
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        if isinstance(leaf, torch.Tensor):
            name = what + pytree.keystr(path)
            if leaf.dim() == 0:
                raise BatchError(
                    f"{name} is a tensor without dimensions; every tensor of a batch needs the "
                    "samples along dimension 0"
                )
            sizes[name] = leaf.shape[0]
    if not sizes:
        raise BatchError(f"{what} holds no tensor; pass a batch with samples along dimension 0")
    (first, size), *others = sizes.items()
    for name, other in others:
        if other != size:
            raise BatchError(
                f"{first} has {size} samples but {name} has {other}; "
                "every tensor of a batch needs the same length along dimension 0"
            )
    if size == 0:
        raise BatchError(f"{what} has no samples; leave empty batches out")
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
    tensors, structure = take_apart(value)
    columns = [torch.split(tensor, list(sizes)) for tensor in tensors]
    return [
        put_together([column[index] for column in columns], structure)
        for index in range(len(sizes))
    ]


def join(values: Sequence[object], sizes: Sequence[int]) -> object:
    """Concatenate the microbatches' outputs along dimension 0; constants are the first's.

    Raises BatchError where an output does not hold its microbatch's samples along dimension 0.
    """
    flat = [flatten(value) for value in values]
    joined: list[object] = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        parts = [leaf for leaf in column if isinstance(leaf, torch.Tensor)]
        if not parts:
            joined.append(column[0])
            continue
        shapes = [tuple(part.shape) for part in parts]
        if [shape[:1] for shape in shapes] != [(size,) for size in sizes] or (
            len({shape[1:] for shape in shapes}) > 1
        ):
            raise BatchError(
                f"outputs of shapes {shapes} cannot be joined to one of {sum(sizes)} samples: "
                f"dimension 0 must hold the microbatch's samples ({list(sizes)}) and the other "
                "dimensions must agree; let the last cell return the samples' outputs, and "
                "the loss function reduce them"
            )
        joined.append(torch.cat(parts))
    return pytree.tree_unflatten(joined, flat[0][1])
