"""What can be seen in a Python object: items of a container, attributes, slots, closures, defaults.

Objects of classes written in C may have hidden state; they are seen as their pickle, or, without
one, not at all.
"""

import functools
import logging
import pickle
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from stagewise.model.forward.large import digest_of_array, digest_of_items

Item = tuple[str, object]  # ".name" or "[key]", and the value
Reader = Callable[[Any], list[Item]]

PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_LEAVES = (
    torch.Tensor,
    torch.Generator,
    ModuleType,
    CodeType,
    Enum,
    logging.Logger,
    logging.Handler,
)
_MOST_ITEMS, _MOST_BYTES = 4096, 1 << 16
_WORD = 8


@dataclass(frozen=True, eq=False)
class Frozen:
    """The contents of a large object or one of a C class, as a pickle or digest.

    A digest of only some parts is not `whole`.
    """

    kind: type
    data: bytes
    whole: bool = True


def contents(value: Any) -> list[Item]:
    """Return what can be seen in `value`; nothing in a leaf."""
    kind: Any = type(value)
    reader = _reader_of(kind)
    return [] if reader is None else reader(value)


def can_hold(value: object) -> bool:
    """Return whether something may be seen in `value`."""
    kind: Any = type(value)
    return _reader_of(kind) is not None


@functools.lru_cache(maxsize=4096)
def _reader_of(kind: type) -> Reader | None:
    """Return the reader of a class's objects; None if they are leaves, or opaque."""
    if issubclass(kind, (*PLAIN, *_LEAVES, Frozen)) or _is_expression(kind):
        return None
    for known, reader in _READERS.items():
        if issubclass(kind, known):
            return reader
    return _of_object if _is_python(kind) else None


def frozen(value: Any) -> object:
    """Return `value`, or its pickle or a digest if nothing can be seen in it otherwise."""
    kind: Any = type(value)
    if not _hides(kind):
        return value
    num_bytes = getattr(value, "nbytes", 0)  # a method of some
    if isinstance(num_bytes, int) and num_bytes > _MOST_BYTES:
        is_array = isinstance(value, np.ndarray) and not value.dtype.hasobject
        return Frozen(kind, *digest_of_array(value)) if is_array else value
    try:
        data = pickle.dumps(value, 4)
    except Exception:  # not picklable; a class may raise anything
        return value
    return Frozen(kind, data) if len(data) <= 2 * _MOST_BYTES else value


@functools.lru_cache(maxsize=4096)
def _hides(kind: type) -> bool:
    known = (*PLAIN, *_LEAVES, Frozen, type, FunctionType, nn.Module)
    found: Any = kind
    return not issubclass(kind, known) and _reader_of(found) is None


def _is_python(kind: type) -> bool:
    """Return whether objects of the class only hold attributes and slots."""
    made = [vars(cls) for cls in kind.__mro__[:-1]]
    makers = [own["__new__"] for own in made if "__new__" in own]
    slots = sum(len(_slots(own)) for own in made)
    return (
        not any(isinstance(maker, BuiltinFunctionType) for maker in makers)
        and kind.__basicsize__
        <= object.__basicsize__ + _WORD * (slots + 2)  # dict, weak references
        and not kind.__itemsize__
    )


def _is_expression(kind: type) -> bool:
    """Return whether objects of a class are sympy's immutable ones: a pickle shows all of them."""
    basic = ("sympy.core.basic", "Basic")  # not imported, because sympy may not be loaded
    own = kind.__module__.startswith("sympy.")
    return own and basic in [(cls.__module__, cls.__name__) for cls in kind.__mro__]


def _slots(own: Mapping[str, object]) -> list[str]:
    names = own.get("__slots__", ())
    assert isinstance(names, (str, tuple, list)) or hasattr(names, "__iter__")
    return [names] if isinstance(names, str) else [*names]


def _of_object(value: object) -> list[Item]:
    found: list[Item] = []
    for cls in type(value).__mro__[:-1]:
        for name in _slots(vars(cls)):
            mangled = f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                found.append((f".{name}", getattr(value, mangled)))
    return [*found, *_extra(value), (".__class__", type(value))]


def _extra(value: object) -> list[Item]:
    """Return the attributes of an object of a subclass of a builtin."""
    return [(f".{name}", item) for name, item in getattr(value, "__dict__", {}).items()]


def _of_large(value: Collection[object]) -> list[Item]:
    return [(" (large)", Frozen(type(value), digest_of_items(value))), *_extra(value)]


def _of_mapping(value: Mapping[object, object]) -> list[Item]:
    if len(value) > _MOST_ITEMS:
        return _of_large(value)
    # What it holds: a subclass's own items() may compute them, or import what they name.
    items = dict.items(value) if isinstance(value, dict) else value.items()
    keys = [key for key, _ in items]
    labels = [f"[{key!r}]" if isinstance(key, PLAIN) else f"[{i}]" for i, key in enumerate(keys)]
    found = [(label, item) for label, (_, item) in zip(labels, items, strict=True)]
    others = [(f"(key {i})", k) for i, k in enumerate(keys) if not isinstance(k, PLAIN)]
    return [*found, *others, *_extra(value)]


def _of_sequence(value: list[object] | tuple[object, ...]) -> list[Item]:
    if len(value) > _MOST_ITEMS:
        return _of_large(value)
    return [*((f"[{index}]", item) for index, item in enumerate(value)), *_extra(value)]


def _of_set(value: set[object]) -> list[Item]:
    if len(value) > _MOST_ITEMS:
        return _of_large(value)
    return [*((f"({item!r})", item) for item in sorted(value, key=repr)), *_extra(value)]


def _of_partial(value: functools.partial[object]) -> list[Item]:
    return [
        (".func", value.func),
        *((f"({index})", item) for index, item in enumerate(value.args)),
        *((f"({name}=)", item) for name, item in value.keywords.items()),
        *_extra(value),
    ]


def _of_builtin(value: BuiltinFunctionType) -> list[Item]:
    owner = value.__self__
    return [] if owner is None or isinstance(owner, (ModuleType, type)) else [(".__self__", owner)]


def _of_wrapper(value: Any) -> list[Item]:
    return [
        ("", getattr(value, "__func__", None) or getattr(value, "func", None) or value.__wrapped__)
    ]


_READERS: dict[Any, Reader] = {
    dict: _of_mapping,
    (list, tuple, deque): _of_sequence,
    (set, frozenset): _of_set,
    (SimpleNamespace, threading.local): _of_object,
    functools.partial: _of_partial,
    MethodType: lambda method: [("", method.__func__), (".__self__", method.__self__)],
    BuiltinFunctionType: _of_builtin,
    property: lambda value: [("", value.fget)],
    (staticmethod, classmethod, functools.cached_property): _of_wrapper,
    type(functools.lru_cache(lambda: None)): _of_wrapper,
    ContextVar: lambda variable: [(".get()", variable.get(None))],
    weakref.ref: lambda reference: [("()", reference())],
}


class ValueKind(NamedTuple):
    """What a class's objects are; remembered, since to ask abstract classes takes long."""

    is_code: bool
    is_tensor: bool
    is_array: bool
    is_iterator: bool


def value_kind(value: object) -> ValueKind:
    """Return what objects of a value's class are."""
    kind: Any = type(value)
    return _value_kind(kind)


@functools.lru_cache(maxsize=4096)
def _value_kind(kind: type) -> ValueKind:
    code = ModuleType, FunctionType, type, nn.Module
    return ValueKind(
        *(issubclass(kind, each) for each in (code, torch.Tensor, np.ndarray, Iterator))
    )


def is_code(value: object) -> bool:
    """Return whether it is code, a module or a parameter, none of which forward assigns."""
    known = value_kind(value)
    return known.is_code or (known.is_tensor and isinstance(value, nn.Parameter))


def is_fixed(kind: type) -> bool:
    """Return whether a class belongs to Python, torch or NumPy, and is fixed by its version."""
    root = kind.__module__.partition(".")[0]
    return root in sys.stdlib_module_names or root in ("torch", "builtins", "numpy")
