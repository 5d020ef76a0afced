"""Make batches of other sizes from the example, to test a capture with.

A trace that baked in a size is still right on its example. Every dynamic number of samples and
length gets another value; the tensors' elements are the example's, repeated cyclically, so that
tokens remain valid.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from stagewise.model.promised_sizes import Size, TakenInput

_SAMPLES = 1, 3  # a trace for two or more may fail for one
_FEW = 4  # samples
_LENGTHS: tuple[Callable[[int], int], ...] = (
    lambda size: size + 1,
    lambda size: size - 1,
    lambda size: 2 * size,
    lambda size: size // 2 + 1,
    lambda size: size,
)


def batches_of_other_sizes(
    example: Mapping[str, object], forms: Sequence[TakenInput], samples: Sequence[int] = _SAMPLES
) -> Iterator[dict[str, object]]:
    """Yield the example at other sizes; `forms` say which of its sizes are dynamic, or related."""
    counts = {form.shape[0] for form in forms if form.counts_samples}
    sizes: dict[Any, int] = {}
    for form in forms:
        for wanted, size in zip(form.shape, form.of(example).shape, strict=True):
            if not isinstance(wanted, int) and wanted.is_symbol:
                sizes.setdefault(wanted, size)
    made: list[dict[Any, int]] = []
    for length in _LENGTHS:
        for count in samples:
            new = {s: count if s in counts else max(length(n), 2) for s, n in sizes.items()}
            if new not in (*made, sizes):
                made.append(new)
                yield _resized(example, forms, new)


def first_samples(example: Mapping[str, object]) -> dict[str, object] | None:
    """Return the first few samples of the example; None if it has no more, or no clear samples."""
    tensors = [t for t in pytree.tree_leaves(dict(example)) if isinstance(t, torch.Tensor)]
    sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim() and tensor.shape[0] > 1)
    if not sizes:
        return None
    ((size, _),) = sizes.most_common(1)
    if size <= _FEW:
        return None
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        torch.Tensor, lambda t: t[:_FEW] if t.dim() and t.shape[0] == size else t, dict(example)
    )


def sizes_text(batch: Mapping[str, object]) -> str:
    """Describe the shapes of a batch's tensors."""
    tensors = {
        name: [tuple(t.shape) for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        for name, value in batch.items()
    }
    return ", ".join(f"{name} of {' and '.join(map(str, s))}" for name, s in tensors.items() if s)


def _resized(
    example: Mapping[str, object], forms: Sequence[TakenInput], sizes: Mapping[Any, int]
) -> dict[str, object]:
    shapes = {(form.name, form.leaf): form.shape for form in forms}
    batch: dict[str, object] = {}
    for name, value in example.items():
        leaves, spec = pytree.tree_flatten(value)
        place = 0
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                leaves[index] = _in_turn(leaf, shapes.get((name, place), tuple(leaf.shape)), sizes)
                place += 1
        batch[name] = pytree.tree_unflatten(leaves, spec)
    return batch


def _in_turn(tensor: torch.Tensor, shape: Sequence[Size], sizes: Mapping[Any, int]) -> torch.Tensor:
    """Resize a tensor along every dimension, repeating its elements cyclically."""
    for axis, wanted in enumerate(shape):
        size = wanted if isinstance(wanted, int) else int(wanted.xreplace(sizes))
        if size != tensor.shape[axis]:
            places = torch.arange(size, device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, places)
    return tensor
