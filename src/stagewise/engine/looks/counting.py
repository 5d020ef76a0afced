"""Infer from targets and keyword arguments which elements of a microbatch count in a mean.

A mean may leave some elements out: an ignored index, padding, the zeros of a mask. They have the
smallest or largest value of their tensor; their fraction in each microbatch shows whether the
microbatches count unequally, and the number of other elements is the weight that corrects it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from stagewise.batch.values import with_paths

_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_PLAIN = (Tensor, torch.nn.Parameter)
_ROUNDING = 1e-3


def values_in(value: object, *, integers_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain real tensors in `value`, each with its place as code (`['a'][0]`)."""
    for place, leaf in with_paths(value):
        if isinstance(leaf, Tensor) and type(leaf) in _PLAIN and leaf.numel() and not leaf.is_meta:
            is_float = leaf.is_floating_point() and not integers_only
            if leaf.layout is torch.strided and (leaf.dtype in _WHOLE or is_float):
                yield place, leaf.detach()


def extremes(tensor: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value."""
    least, greatest = torch.aminmax(tensor)
    return least.item(), greatest.item()


def most_unlike(microbatches: Sequence[object]) -> set[int]:
    """Return the microbatches that differ most from the one before.

    What is compared is the fraction of a tensor that has its smallest or largest value in the
    batch.
    """
    found: set[int] = set()
    tensors = [[tensor for _, tensor in values_in(part)] for part in microbatches]
    for column in zip(*tensors, strict=False):
        ends = [extremes(tensor) for tensor in column]
        for value in (min(e[0] for e in ends), max(e[1] for e in ends)):
            parts = [_part(tensor, value) for tensor in column]
            jumps = [abs(one - other) for one, other in itertools.pairwise(parts)]
            if max(jumps, default=0):
                found.add(jumps.index(max(jumps)) + 1)
    return found


def _part(tensor: Tensor, value: float) -> float:
    return int((tensor == value).sum()) / tensor.numel()


def weight_that_fits(targets: Sequence[object], counts: tuple[float, float] | None) -> str | None:
    """Return code of a weight that makes two targets count as in `counts`; None if none does."""
    if counts is None:
        return None
    pairs = zip(*map(values_in, targets), strict=False)
    weights = [
        weight for (place, one), (_, other) in pairs for weight in _weights(place, one, other)
    ]
    for _, code, numbers in sorted(weights, key=lambda weight: weight[0]):
        total = sum(numbers)
        if total and all(
            abs(number / total - count) <= _ROUNDING
            for number, count in zip(numbers, counts, strict=True)
        ):
            return f"weight=lambda target: {code}"
    return None


def _weights(place: str, first: Tensor, second: Tensor) -> Iterator[tuple[int, str, list[float]]]:
    """Yield candidate weights: (priority, code, values for the two targets)."""
    both = (first, second)
    ends = [*map(extremes, both)]
    least, greatest = min(e[0] for e in ends), max(e[1] for e in ends)
    if least >= 0 and (first.dtype is torch.bool or first.is_floating_point()):
        yield 0, f"target{place}.sum()", [float(tensor.sum()) for tensor in both]
    elif first.dtype in _WHOLE:
        for value in (least, greatest):
            numbers = [float((tensor != value).sum()) for tensor in both]
            yield int(value >= 0), _others(place, value), numbers
    yield 2, f"target{place}.numel()", [float(tensor.numel()) for tensor in both]


def _others(place: str, value: float) -> str:
    return f"(target{place} != {value:g}).sum()"


def left_out(target: object, given: Mapping[str, object]) -> tuple[str, str] | None:
    """Describe a constant part of the target or keyword arguments, which may not count at all.

    Also returns the code of a weight that is 0 for it. None if all parts may count.
    """
    for name, value in (("target", target), *given.items()):
        for place, tensor in values_in(value):
            least, greatest = extremes(tensor)
            if least != greatest:
                continue
            is_whole = tensor.dtype in _WHOLE and tensor.dtype is not torch.bool
            if is_whole:
                return f"{name}{place} is {least:g} throughout", _others(place, least)
            if least == 0:
                return f"{name}{place} is 0 throughout", f"target{place}.sum()"
    return None
