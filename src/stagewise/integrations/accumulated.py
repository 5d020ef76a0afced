"""The batches of an update as the microbatches of one step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagewise.batch.markers import Microbatches
from stagewise.batch.split import batch_size, microbatch_sizes, split

Inputs = Mapping[str, Any]
Count = tuple[int, float]  # of a part: its samples, and its weight in means


@dataclass(frozen=True)
class Accumulated:
    """Arguments and target of a step, already split, and the number of its microbatches."""

    keywords: dict[str, Any]
    target: Microbatches
    count: int
    weight: Callable[..., Any] | None = None  # of a part, by its target


def as_microbatches(
    calls: Sequence[Inputs], targets: Sequence[Inputs], counts: Sequence[int], smallest: int = 1
) -> Accumulated:
    """Split the batches, given as arguments `calls` and their `targets`, into `counts` parts each.

    Parts have at least `smallest` samples, if the batch has. What is no tensor with samples is the
    same in all batches. Each sample has its part's index, also where parts are joined for a look.
    """
    parts: list[Inputs] = []
    ends: list[Inputs] = []
    for call, target, count in zip(calls, targets, counts, strict=True):
        samples = _with_samples(call)
        size = batch_size(samples, "the batch")
        sizes = microbatch_sizes(size, max(1, min(size // smallest, count)))
        parts += _split(samples, sizes)
        shares = [each / size / len(calls) for each in sizes]
        indices = [torch.full((n,), len(ends) + i) for i, n in enumerate(sizes)]
        rows = zip(_split(_with_samples(target), sizes), shares, indices, strict=True)
        others = {name: value for name, value in target.items() if name not in _names(target)}
        ends += [
            {"inputs": {**others, **row}, "share": share, "index": index}
            for row, share, index in rows
        ]
    whole = {name: value for name, value in calls[0].items() if name not in parts[0]}
    split_up = {name: Microbatches([part[name] for part in parts]) for name in parts[0]}
    return Accumulated({**whole, **split_up}, Microbatches(ends), len(parts))


def part_by_part(
    called: dict[str, Any],
    batch: object,
    count: int,
    smallest: int,
    weight: Callable[[Any], float | torch.Tensor] | None,
) -> tuple[Accumulated, list[Count]]:
    """Return a step of one batch, in `count` parts, and what these count.

    Each sample has its part's index, so that two parts can be joined, to look at their loss.
    """
    size = batch_size(called, "the batch")
    sizes = microbatch_sizes(size, max(1, min(size // smallest, count)))
    parts = split(batch, sizes)
    rows = [{"index": torch.full((n,), i), "batch": parts[i]} for i, n in enumerate(sizes)]
    counts = sizes if weight is None else [float(weight(part)) for part in parts]
    weigh = None if weight is None else lambda target: weight(target["batch"])
    step = Accumulated(called, Microbatches(rows), len(sizes), weigh)
    return step, [*zip(sizes, counts, strict=True)]


def _names(batch: Inputs) -> set[str]:
    return {n for n, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}


def _with_samples(batch: Inputs) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in batch if name in _names(batch)}


def _split(samples: dict[str, torch.Tensor], sizes: Sequence[int]) -> list[Inputs]:
    return split(samples, sizes)  # type: ignore[return-value]
