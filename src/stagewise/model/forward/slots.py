"""List the places other than tensors that a forward can write to (slots), with their contents.

They are attributes of modules, objects and classes, entries of containers, closure variables, and
globals of the user's own code. A slot has the same key from every cell's point of view, so that one
cell's writes are recognised in what another one sees. Parameters are not slots.
"""

import inspect
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.model.forward.contents import PLAIN, Frozen, Item, frozen, is_code, value_kind
from stagewise.model.forward.users_code import HOOKS
from stagewise.model.forward.visible import Node, stored_in

Key = tuple[int, object]  # the holder's id, and the name in it
_ABSENT = object()
_MOST_BYTES, _MOST_ITEMS = 1 << 20, 4096  # of a copied tensor, of an inspected dict
_DEPTH = 4  # of compared values
_SEQUENCES = (list, deque, set)


@dataclass(frozen=True, eq=False)
class Slot:
    """One slot: its value, and a `copy` that later in-place changes do not affect.

    `write` stores a value in it; `holder` is kept alive so that the key's id is not reused.
    """

    name: str
    holder: object
    value: object
    copy: object
    write: Callable[[Any], None]
    kind: str  # "hook" (only a module's hook sees it), "buffer", "statistic" (BatchNorm's) or ""
    mark: object  # changes where a change of the value is not visible otherwise

    @property
    def is_shared_tensor(self) -> bool:
        """Whether it is a tensor too large to copy, which code that runs again would change."""
        return self.copy is self.value and isinstance(self.value, torch.Tensor)

    def now(self) -> "Slot":
        """Return the slot as it is now, if its value can have changed in place."""
        if isinstance(self.holder, _SEQUENCES):
            return replace(self, copy=[*map(_copy, self.holder)])
        if self.mark is None and self.copy is self.value:
            return self
        return replace(self, copy=_copy(self.value), mark=_mark(self.value))

    def fresh(self) -> object:
        """Return another copy."""
        copies: Any = self.copy
        return [*map(_copy, copies)] if isinstance(self.holder, _SEQUENCES) else _copy(copies)


@dataclass(frozen=True)
class Snapshot:
    """All visible slots, and the ids of their holders."""

    slots: dict[Key, Slot]
    holders: set[int]

    def put(self, keys: Iterable[Key], now: "Snapshot") -> None:
        """Write copies of the values of slots `keys` back; `now` is the current snapshot."""
        for key in keys:
            slot = self.slots.get(key)
            if slot is not None:
                slot.write(slot.fresh())
            elif key in now.slots:
                now.slots[key].write(_ABSENT)

    @contextmanager
    def kept(self, now: Callable[[], "Snapshot"]) -> Iterator[None]:
        """Experiment inside, on copies; restore all slots afterwards. `now` takes a snapshot."""
        for slot in self.slots.values():
            if slot.copy is not slot.value:
                slot.write(slot.fresh())
        try:
            yield
        finally:
            after = now()
            for key in changed(self, after) - self.slots.keys():
                after.slots[key].write(_ABSENT)
            for key, slot in self.slots.items():
                if key not in after.slots or after.slots[key].value is not slot.value:
                    slot.write(slot.value)


def changed(before: Snapshot, after: Snapshot) -> set[Key]:
    """Return the slots that differ, among holders that exist in both snapshots."""
    found = set()
    for key in {**before.slots, **after.slots}:
        one, other = before.slots.get(key), after.slots.get(key)
        if one is not None and other is not None:
            if not _same(one, other):
                found.add(key)
        elif key[0] in before.holders and key[0] in after.holders:
            found.add(key)
    return found


def only_read(nodes: Iterable[Node], keys: Iterable[Key]) -> set[Key]:
    """Return which of `keys` are attributes or globals that the code of `nodes` does not fill."""
    owners, stored = dict[int, object](), set[object]()
    for value in (node.value for node in nodes):
        if isinstance(value, FunctionType):
            stored |= stored_in(value.__code__)
            owners[id(value.__globals__)] = None
        owners[id(value if isinstance(value, type) else getattr(value, "__dict__", None))] = value
    return {
        (holder, name)
        for holder, name in keys
        if holder in owners and name not in stored and not _fills_itself(owners[holder], name)
    }


def _fills_itself(owner: object, name: object) -> bool:
    """Whether it is an attribute that its class computes when read, as `cached_property` does."""
    found = inspect.getattr_static(type(owner), str(name), None)
    return not isinstance(owner, type) and hasattr(found, "__get__")


def slots_in(node: Node) -> Iterator[tuple[Key, Slot]]:
    """Yield the slots of an object."""
    value: Any = node.value
    kind = "hook" if any(f".{kind}[" in f".{node.path}" for kind in HOOKS) else ""
    for label, holder, name in _holders(value, node.items):
        if isinstance(holder, CellType):
            write, held = _variable(holder), holder.cell_contents
        elif isinstance(holder, MutableMapping):
            write, held = _entry(holder, name), holder.get(name, _ABSENT)
        else:
            write, held = _attribute(holder, name), vars(holder).get(name, _ABSENT)
        if held is not _ABSENT and not is_code(held):
            path = _as_written(f"{node.path}{label}")
            if isinstance(value, nn.Module) and holder is value._buffers:
                of = "statistic" if isinstance(value, _BatchNorm) else "buffer"
            else:
                of = kind
            slot = Slot(path, holder, held, _copy(held), write, of, _mark(held))
            yield (id(holder), name), slot
    if isinstance(value, _SEQUENCES):
        held = [*value]
        path, copy = _as_written(node.path), [*map(_copy, held)]
        yield (id(value), None), Slot(path, value, held, copy, _contents(value), kind, None)


def stores_in(value: Any) -> list[Any]:
    """Return the parts of a value that hold slots by name."""
    own = getattr(value, "__dict__", None)
    if isinstance(value, (dict, type, *_SEQUENCES)):
        return [value]
    if isinstance(value, FunctionType):
        return [own, value.__globals__]
    if not isinstance(own, dict):
        return []
    return [own, own["_buffers"]] if isinstance(value, nn.Module) else [own]


def _holders(value: Any, items: Sequence[Item]) -> Iterator[tuple[str, Any, object]]:
    """Yield (label, holder, name in it) of everything visible in a value."""
    if isinstance(value, dict):
        for key in itertools.islice(value, _MOST_ITEMS):
            yield f"[{key!r}]" if isinstance(key, PLAIN) else "[...]", value, key
    elif isinstance(value, FunctionType):
        for label, _ in items:
            yield from _of_function(value, label)
    else:
        stores = stores_in(value)
        for label, _ in items:
            for store in stores if label.startswith(".") else ():
                if label[1:] in (vars(store) if isinstance(store, type) else store):
                    yield label, store, label[1:]


def _of_function(value: FunctionType, label: str) -> Iterator[tuple[str, Any, object]]:
    if label.startswith("."):
        if label[1:] in vars(value):
            yield label, vars(value), label[1:]
        return
    name, *rest = label[1:].split(".")
    free = value.__code__.co_freevars
    if name in free and value.__closure__ is not None:
        yield label, value.__closure__[free.index(name)], None
        return
    held = value.__globals__.get(name, _ABSENT)
    if rest and isinstance(held, ModuleType):
        yield label, vars(held), rest[0]
    elif not rest and held is not _ABSENT:
        yield label, value.__globals__, name


def _as_written(path: str) -> str:
    """Return a path as it is written in code."""
    *_, last = path.split(" ")
    return last.replace("__class__.", "").lstrip(".")


def _copy(value: Any) -> Any:
    """Copy a tensor or array, unless it is large; return anything else as it is."""
    kind = value_kind(value)
    if kind.is_tensor:
        plain = value.layout is torch.strided and not isinstance(value, nn.Parameter)
        return value.detach().clone() if plain and value.nbytes <= _MOST_BYTES else value
    return value.copy() if kind.is_array and value.nbytes <= _MOST_BYTES else value


def _mark(value: Any) -> object:
    kind = value_kind(value)
    if kind.is_tensor:
        return None if value.is_inference() else value._version
    if kind.is_iterator:
        return operator.length_hint(value, -1)
    stands_for = frozen(value)
    return stands_for.data if isinstance(stands_for, Frozen) else None


def _variable(cell: CellType) -> Callable[[Any], None]:
    def write(value: Any) -> None:
        if value is not _ABSENT:
            cell.cell_contents = value

    return write


def _entry(mapping: MutableMapping[Any, Any], name: object) -> Callable[[Any], None]:
    def write(value: Any) -> None:
        if value is not _ABSENT:
            mapping[name] = value
        else:
            mapping.pop(name, None)

    return write


def _attribute(owner: type, name: object) -> Callable[[Any], None]:
    def write(value: Any) -> None:
        if value is not _ABSENT:
            setattr(owner, str(name), value)
        elif name in vars(owner):
            delattr(owner, str(name))

    return write


def _contents(container: Any) -> Callable[[Any], None]:
    def write(values: Any) -> None:
        if values is not _ABSENT:
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(values)

    return write


def _same(one: Slot, other: Slot) -> bool:
    if one.copy is one.value and one.mark is not None and other.mark is not None:
        return one.value is other.value and bool(one.mark == other.mark)
    return alike(one.copy, other.copy)


def alike(one: Any, other: Any, depth: int = _DEPTH) -> bool:
    """Return whether two values are equal, or the same object."""
    if one is other:
        return True
    same_kind = type(one) is type(other) or (
        type(one).__qualname__ == type(other).__qualname__ and "<locals>" in type(one).__qualname__
    )
    if not same_kind or not depth:
        return False
    if isinstance(one, torch.Tensor):
        forms = (one.shape, one.dtype, one.device), (other.shape, other.dtype, other.device)
        return forms[0] == forms[1] and (one.is_meta or torch.equal(one.detach(), other.detach()))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool(np.array_equal(one, other))
    if isinstance(one, PLAIN):
        return bool(one == other or (one != one and other != other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[k], other[k], depth - 1) for k in one)
    if isinstance(one, set):
        return bool(one == other)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(
            alike(a, b, depth - 1) for a, b in zip(one, other, strict=True)
        )
    own: object = getattr(one, "__dict__", None)
    return isinstance(own, dict) and alike(own, vars(other), depth - 1)
