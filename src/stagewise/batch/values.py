"""Values that cross a boundary: any pytree of tensors and constants.

A value is taken apart into its tensors and a Structure (how to rebuild it, with its constants), so
that transports only move tensors, and the structure is sent only when it changes. A tensor that
occurs several times is taken once, so that it arrives as one tensor: its gradients are summed in
the plain model's order, and it travels once. Dataclasses are taken apart too.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from stagewise.batch.objects import opened
from stagewise.errors import CellError

_SHARED = "_stagewise_shared"  # attribute set on tensors


class Varying:
    """A class of values whose form may differ from step to step."""


@dataclass(frozen=True)
class Structure:
    """A pytree without its tensors.

    `places[i]` is the index of the tensor at leaf i, or None if the leaf is `constants[i]`.
    """

    spec: pytree.TreeSpec
    constants: tuple[object, ...]
    places: tuple[int | None, ...]

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling a TreeSpec warns, so the tree itself is pickled, with marks for its tensors.
        leaves = [
            constant if place is None else _Mark(place)
            for place, constant in zip(self.places, self.constants, strict=True)
        ]
        return _structure_of, (pytree.tree_unflatten(leaves, self.spec),)


@dataclass(frozen=True)
class _Mark:
    """A placeholder for a tensor."""

    place: int


def _structure_of(skeleton: object) -> Structure:
    if isinstance(skeleton, _Mark):
        return ONE
    if isinstance(skeleton, tuple) and len(skeleton) == 1 and isinstance(skeleton[0], _Mark):
        return ONE_IN_TUPLE
    return _walked(skeleton)


def _walked(skeleton: object) -> Structure:
    leaves, spec = flatten(skeleton)
    return Structure(
        spec,
        tuple(None if isinstance(leaf, _Mark) else leaf for leaf in leaves),
        tuple(leaf.place if isinstance(leaf, _Mark) else None for leaf in leaves),
    )


def flatten(value: object) -> tuple[list[object], pytree.TreeSpec]:
    """Return the leaves of `value` and its spec; dataclasses that hold tensors are nodes.

    CellError for an object of another class that hides tensors: their gradients would be lost at a
    boundary.
    """
    found, spec = pytree.tree_flatten(value)
    leaves = [*found]
    found.clear()  # pytree's recursive function refers to itself, and keeps its list alive
    opaque = {type(leaf): leaf for leaf in leaves if _hides_tensors(leaf)}
    if not opaque:
        return leaves, spec
    for cls in opaque:
        if not dataclasses.is_dataclass(cls):
            raise CellError(
                f"a {cls.__name__} hides tensors from the pipeline; use a tuple, dict or "
                "dataclass instead, or register it with torch.utils._pytree"
            )
        pytree.register_dataclass(cls)
    return flatten(value)


def output_leaves(output: object) -> list[object]:
    """Return the leaves of a model's output, with objects taken apart."""
    return flatten(opened(output))[0]


def tensors_of(value: object) -> list[torch.Tensor]:
    """Return the tensors among the leaves of `value`, with objects taken apart."""
    if isinstance(value, torch.Tensor):  # without a tree traversal
        return [value]
    if type(value) is dict and not value:
        return []
    return [leaf for leaf in output_leaves(value) if isinstance(leaf, torch.Tensor)]


def versions_of(*values: object) -> list[int]:
    """Return the versions of their tensors, which grow when they are written to."""
    tensors = (tensor for value in values for tensor in tensors_of(value))
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def with_paths(
    value: object, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, object]]:
    """Return the leaves of `value` with their paths, such as `['logits'][0]`.

    Unlike torch's own function, it also handles types registered without key paths, such as
    diffusers' outputs.
    """
    try:
        keyed = pytree.tree_flatten_with_path(value, is_leaf=is_leaf)[0]
    except ValueError:
        return list(_walked_with_paths(value, is_leaf, ""))
    return [(pytree.keystr(path), leaf) for path, leaf in keyed]


def _walked_with_paths(
    value: object, is_leaf: Callable[[Any], bool] | None, path: str
) -> Iterator[tuple[str, object]]:
    parts, spec = pytree.tree_flatten(value, is_leaf=lambda node: node is not value)
    if spec.is_leaf() or (is_leaf is not None and is_leaf(value)):
        yield path, value
        return
    for part, name in zip(parts, _names_of_parts(value, len(parts)), strict=True):
        yield from _walked_with_paths(part, is_leaf, path + name)


def _names_of_parts(value: object, count: int) -> list[str]:
    if isinstance(value, Mapping) and len(value) == count:
        return [f"[{key!r}]" for key in value]
    fields = getattr(value, "_fields", None)
    if fields is None and dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
    if fields is not None and len(fields) == count:
        return [f".{name}" for name in fields]
    return [f"[{index}]" for index in range(count)]


Apart = tuple[list[torch.Tensor], Structure]  # a value taken apart, as it travels between stages


def take_apart(value: object) -> Apart:
    """Split `value` into its tensors, in order and each once, and its structure."""
    if isinstance(value, torch.Tensor):  # the common forms, without a tree traversal
        return [value], ONE
    if type(value) is tuple and len(value) == 1 and type(value[0]) is torch.Tensor:
        return [value[0]], ONE_IN_TUPLE
    if type(value) is tuple and all(item is None or type(item) is torch.Tensor for item in value):
        present = [item for item in value if item is not None]
        if len({id(tensor) for tensor in present}) == len(present):
            return present, _form(tuple(item is not None for item in value))
    leaves, spec = flatten(value)
    tensors: list[torch.Tensor] = []
    known: dict[int, int] = {}
    places: list[int | None] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            places.append(None)
            continue
        if id(leaf) not in known:
            known[id(leaf)] = len(tensors)
            tensors.append(leaf)
        places.append(known[id(leaf)])
    constants = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return tensors, Structure(spec, constants, tuple(places))


@functools.cache
def _form(is_tensor: tuple[bool, ...]) -> Structure:
    """Return the structure of a tuple of tensors and None."""
    places = itertools.count()
    return _structure_of(tuple(_Mark(next(places)) if tensor else None for tensor in is_tensor))


def put_together(tensors: Sequence[torch.Tensor], structure: Structure) -> object:
    """Rebuild a value: the inverse of `take_apart`."""
    if structure is ONE:
        return tensors[0]
    if structure is ONE_IN_TUPLE:
        return (tensors[0],)
    leaves = [
        constant if place is None else tensors[place]
        for place, constant in zip(structure.places, structure.constants, strict=True)
    ]
    return pytree.tree_unflatten(leaves, structure.spec)


def optionals(apart: Apart) -> Sequence[torch.Tensor | None]:
    """Return the items of a tuple of tensors and None."""
    tensors, structure = apart
    if structure is ONE_IN_TUPLE:
        return tensors
    return [None if place is None else tensors[place] for place in structure.places]


def move(value: object, device: torch.device) -> object:
    """Return `value` with every tensor on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    tensors, structure = take_apart(value)
    return put_together([tensor.to(device) for tensor in tensors], structure)


def detached(value: object) -> object:
    """Return `value` with its tensors detached, also those inside objects."""
    tensors, structure = take_apart(opened(value))
    return put_together([tensor.detach() for tensor in tensors], structure)


def leaf_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` as a detached leaf, which requires a gradient if `tensor` does."""
    if tensor.is_inference():  # autograd cannot use it, and it has no version counter
        return tensor.clone()
    leaf = tensor.detach()
    if tensor.requires_grad:
        leaf.requires_grad_()
    if hasattr(tensor, _SHARED):
        mark_shared(leaf)
    return leaf


def shared(tensors: Sequence[torch.Tensor]) -> tuple[bool, ...]:
    """Return, per tensor, whether it shares memory with another: in-place changes affect both."""
    found = [hasattr(tensor, _SHARED) for tensor in tensors]
    for (i, one), (j, other) in itertools.combinations(enumerate(tensors), 2):
        if not (found[i] and found[j]) and _overlap(one, other):
            found[i] = found[j] = True
    return tuple(found)


def mark_shared(tensor: torch.Tensor) -> torch.Tensor:
    """Mark `tensor` for `shared` as having shared memory before it was sent or copied."""
    setattr(tensor, _SHARED, True)
    return tensor


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    storage = one.untyped_storage()
    if storage.nbytes() == 0 or storage._cdata != other.untyped_storage()._cdata:
        return False
    # In NumPy, since the tensors may be fake (in an estimate).
    taken = np.zeros(storage.nbytes(), dtype=np.bool_)
    _bytes_of(one, taken)[...] = True
    return bool(_bytes_of(other, taken).any())


def _bytes_of(tensor: torch.Tensor, memory: np.ndarray) -> np.ndarray:
    """View the entries of `memory` (one per byte of the storage) that `tensor` occupies."""
    size = tensor.element_size()
    return np.lib.stride_tricks.as_strided(
        memory[int(tensor.storage_offset()) * size :],
        (*tensor.shape, size),
        (*(stride * size for stride in tensor.stride()), 1),
    )


def _hides_tensors(leaf: object) -> bool:
    if leaf is None or isinstance(leaf, (torch.Tensor, _Mark, str, int, float, type, range)):
        return False
    if dataclasses.is_dataclass(leaf):
        parts = pytree.tree_leaves([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        return any(_is_tensor(part) or _hides_tensors(part) for part in parts)
    return any(map(_is_tensor, pytree.tree_leaves([*_contents(leaf)])))


def _contents(leaf: object) -> Iterator[object]:
    """Yield what an object that is not a pytree node holds: items, attributes, slots."""
    if isinstance(leaf, Mapping):
        yield from map(dict, [leaf])
    elif isinstance(leaf, Sequence | Set) and not isinstance(leaf, bytes):
        yield list(leaf)
    yield getattr(leaf, "__dict__", None)
    for cls in type(leaf).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(leaf, name, None)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, (torch.Tensor, _Mark))


ONE, ONE_IN_TUPLE = _walked(_Mark(0)), _walked((_Mark(0),))  # one tensor; a tuple of one tensor
