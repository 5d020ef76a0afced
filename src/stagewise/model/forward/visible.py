"""What the Python code of a forward can see besides the values of tensors.

That is everything reachable from the model's modules (attributes, hooks, children), and what the
functions that forward reaches refer to: class attributes, closures, defaults, and globals of the
user's own code. A trace fixes all of it. It has two users: the fingerprint of a capture on disk,
and the watch that notices changes.

Names are resolved by name only: an attribute counts if a function that forward reaches has its name
among its names or strings. Code of libraries is assumed fixed.
"""

import dis
import functools
import os
import re
import sysconfig
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from stagewise.model.forward.contents import PLAIN, Item, can_hold, contents, frozen, is_fixed
from stagewise.model.forward.users_code import HOOKS, is_users

# nn.Module's own bookkeeping, on which no computation of forward depends.
_BOOKKEEPING = {
    *("_parameters", "_buffers", "_modules", "training", *HOOKS),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_non_persistent_buffers_set"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_is_full_backward_hook"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks_with_kwargs", "_backward_pre_hooks_with_kwargs"),
}
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__"}
_STORES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_NAME")
_OF_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
# Methods that Python calls implicitly; without constructors, which ran before.
_PROTOCOL = {
    *("__call__", "__get__", "__getattr__", "__getattribute__", "__getitem__", "__missing__"),
    *("__len__", "__bool__", "__contains__", "__iter__", "__next__", "__enter__", "__exit__"),
    *("__float__", "__int__", "__index__", "__neg__", "__eq__", "__lt__", "__le__"),
    *("__gt__", "__ge__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"),
    *("__truediv__", "__rtruediv__", "__pow__", "__rpow__", "__matmul__", "__rmatmul__"),
    *("__floordiv__", "__rfloordiv__", "__mod__", "__rmod__", "__divmod__", "__abs__", "__ne__"),
    *("__pos__", "__invert__", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__"),
    *("__round__", "__trunc__", "__floor__", "__ceil__", "__hash__", "__str__", "__repr__"),
    *("__format__", "__complex__", "__reversed__"),
}
_NAME_BY_TEXT = {"getattr", "setattr", "hasattr", "attrgetter", "__getattribute__"}
_LEAST_PART = 2  # letters of a string that counts as a part of names
_MOST_NODES = 5000
_ATOMS = {type(None), bool, int, float, str}  # the most frequent kinds, in which nothing is
_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple(_PATHS[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
# Of another environment that this one sees: the system's, the user's own, one in PYTHONPATH.
_INSTALLED = "/site-packages/", "/dist-packages/"


@dataclass(frozen=True, eq=False)
class Node:
    """An object with `items`, found as item `place` of the walk's node `parent`."""

    path: str
    value: object
    items: Sequence[Item]
    parent: int
    place: int


def is_own(file: str) -> bool:
    """Return whether a file belongs to the user, not to a library."""
    if not is_users(file) or file.startswith(_LIBRARIES):
        return False
    path = file.replace(os.sep, "/")
    return not any(folder in path for folder in _INSTALLED)


class Sight:
    """What can be seen from a module, by the names that forward's code uses.

    `runs_itself` are modules that cells call as they are, which are not inspected. With
    `named_only`, attributes only count if some code names them; `names` are all such names.
    """

    def __init__(self, runs_itself: Iterable[nn.Module] = (), *, named_only: bool) -> None:
        self._skipped: weakref.WeakSet[nn.Module] = weakref.WeakSet(runs_itself)
        self._named_only = named_only
        self.names: set[str] = {"forward", *_PROTOCOL}
        self._parts: set[str] = set()  # of names that code builds from strings
        self.is_whole = True  # whether the last walk was complete
        self.asks_modes = False  # whether code reads `training` of other modules than its own

    def apart(self) -> "Sight":
        """Return a sight that knows the same names, and learns others for itself."""
        other = Sight(named_only=self._named_only)
        other._skipped = self._skipped
        other.learn(self)
        return other

    def learn(self, other: "Sight") -> None:
        """Know the names that `other` knows."""
        self.names |= other.names
        self._parts |= other._parts

    def walk(self, *models: nn.Module) -> list[Node]:
        """Return everything the forwards of `models` can see, each object once, nearest first."""
        known = -1
        while len(self.names) + len(self._parts) != known:  # newly reached code adds names
            known = len(self.names) + len(self._parts)
            nodes = self._walk(models)
        return nodes

    def _walk(self, models: Sequence[nn.Module]) -> list[Node]:
        nodes: list[Node] = []
        waiting: deque[tuple[str, object, int, int]] = deque(("", m, -1, -1) for m in models)
        seen = {*map(id, models)}
        while waiting and len(nodes) < _MOST_NODES * len(models):
            path, value, parent, place = waiting.popleft()
            here, items = len(nodes), self.items(value)
            nodes.append(Node(path, value, items, parent, place))
            for index, (label, item) in enumerate(items):
                if id(item) not in seen and self.holds(item):
                    seen.add(id(item))
                    waiting.append((f"{path}{label}".lstrip("."), item, here, index))
        self.is_whole = not waiting
        return nodes

    def skips(self, module: nn.Module) -> bool:
        """Return whether cells call the module itself."""
        return module in self._skipped

    def holds(self, value: Any) -> bool:
        """Return whether something can be seen in `value`."""
        if type(value) in _ATOMS:
            return False
        if isinstance(value, nn.Module):
            return value not in self._skipped
        if isinstance(value, type):
            return not is_fixed(value)
        return isinstance(value, FunctionType) or can_hold(value)

    def items(self, value: object) -> list[Item]:
        """Return what can be seen in `value`."""
        if isinstance(value, nn.Module):
            found = self._of_module(value)
        elif isinstance(value, type):
            found = self._of_class(value)
        elif isinstance(value, FunctionType):
            found = self._of_function(value)
        else:
            found = contents(value)
            if self._named_only and found and found[-1][0] == ".__class__":  # an object's
                found = [item for item in found if self._is_named(item)]
        return [(label, item if type(item) in _ATOMS else frozen(item)) for label, item in found]

    def _is_named(self, item: Item) -> bool:
        return self._may_name(item[0][1:]) or item[0] == ".__class__"

    def _may_name(self, name: str) -> bool:
        """Return whether reached code uses the name, or may build it from strings."""
        return name in self.names or any(part in name for part in self._parts)

    def _of_module(self, module: nn.Module) -> list[Item]:
        own = vars(module)
        found: list[Item] = [
            (f".{name}", value)
            for name, value in own.items()
            if name not in _BOOKKEEPING and (not self._named_only or self._may_name(name))
        ]
        for registry in (own["_parameters"], own["_buffers"], own["_modules"]):
            found += [(f".{name}", value) for name, value in registry.items()]
        for kind in HOOKS:
            found += [(f".{kind}[{i}]", hook) for i, hook in enumerate(own[kind].values())]
        return [*found, (".__class__", type(module))]

    def _of_class(self, cls: type) -> list[Item]:
        named = [
            (f".{name}", value)
            for name, value in vars(cls).items()
            if self._may_name(name) and name not in _OF_CLASSES
        ]
        bases = [(f".__bases__[{i}]", base) for i, base in enumerate(cls.__bases__)]
        return [*named, *bases, (".__class__", type(cls))]

    def _of_function(self, function: FunctionType) -> list[Item]:
        code, names = function.__code__, names_in(function.__code__)
        self.names |= names
        found: list[Item] = [(".__code__", code)]
        found += [(f" default {i}", value) for i, value in enumerate(function.__defaults__ or ())]
        found += [(f" default {n}", v) for n, v in (function.__kwdefaults__ or {}).items()]
        found += [(f".{name}", value) for name, value in vars(function).items()]
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                found.append((f" {name}", cell.cell_contents))
            except ValueError:  # not assigned yet
                continue
        if is_own(code.co_filename):
            self.asks_modes |= "training" in names and modes_asked_in(code)
            if names & _NAME_BY_TEXT:
                self._parts |= parts_in(code)
            if names & {"environ", "getenv"}:
                found.append((" os.environ", vars(os.environ)["_data"]))
            used = names if "globals" in names else globals_in(code)
            for name in sorted(used & function.__globals__.keys()):
                value = function.__globals__[name]
                found.append((f" {name}", value))
                if isinstance(value, ModuleType):
                    found += self._of_import(name, value, names)
        return found

    def _of_import(self, name: str, module: ModuleType, names: frozenset[str]) -> list[Item]:
        held = vars(module)
        if is_own(getattr(module, "__file__", None) or "<"):
            used = [n for n in held if n in names or self._may_name(n)]
        else:
            used = [n for n in names & held.keys() if isinstance(held[n], PLAIN)]
        return [(f" {name}.{n}", held[n]) for n in sorted(used)]


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of its nested functions."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _with_nested(inner)


@functools.lru_cache(maxsize=4096)
def globals_in(code: CodeType) -> frozenset[str]:
    """Return the global names, without attributes, of a function and its nested functions."""
    every = (i for each in _with_nested(code) for i in dis.get_instructions(each))
    return frozenset(i.argval for i in every if i.opname in _OF_GLOBALS)


@functools.lru_cache(maxsize=4096)
def modes_asked_in(code: CodeType) -> bool:
    """Return whether it reads `training` of anything but its first argument, mostly `self`."""
    first = code.co_varnames[0] if code.co_argcount else ""
    for each in _with_nested(code):
        read: object = None  # the variable that was read last
        for i in dis.get_instructions(each):
            if (i.opname, i.argval) == ("LOAD_ATTR", "training") and read != first:
                return True
            names = i.argval if isinstance(i.argval, tuple) else (i.argval,)
            read = names[-1] if i.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else None
    return False


@functools.lru_cache(maxsize=4096)
def stored_in(code: CodeType) -> frozenset[str]:
    """Return the names of attributes and globals that a function and its nested ones write."""
    every = (i for each in _with_nested(code) for i in dis.get_instructions(each))
    return frozenset(i.argval for i in every if i.opname in _STORES)


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """Return the names and strings of a function and its nested functions."""
    return frozenset(_texts(code)).union(*(each.co_names for each in _with_nested(code)))


@functools.lru_cache(maxsize=4096)
def parts_in(code: CodeType) -> frozenset[str]:
    """Return possible parts of names in the strings of a function and its nested functions."""
    found = {part for text in _texts(code) for part in re.findall(r"[A-Za-z_]\w*", text)}
    return frozenset(part for part in found if len(part) >= _LEAST_PART)


def _texts(code: CodeType) -> Iterator[str]:
    constants = (each.co_consts for each in _with_nested(code))
    return (text for texts in constants for text in texts if isinstance(text, str))
