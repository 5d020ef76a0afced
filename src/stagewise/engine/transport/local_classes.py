"""Pickle classes defined inside a function, between processes that all ran that function.

Problem: pickle looks a class up by its name in its module, and a dataclass or NamedTuple defined
inside a function is not there.
Idea: the other process runs the same code, so it has a class of this name too; if the function ran
several times, the n-th class here is the n-th there. If it has none yet (the class is made in
forward), one is made from its fields.
"""

import collections
import dataclasses
import gc
import io
import pickle
from collections.abc import Callable
from typing import IO, Any

_LOCAL = "<locals>"
_Named = tuple[str, str, int, int, bool, tuple[str, ...]]


class LocalClasses:
    """How one rank names such classes, and which class it found for each name of others."""

    def __init__(self) -> None:
        self._names: dict[type, _Named] = {}
        self._found: dict[_Named, type] = {}

    def pickled(self, value: object) -> bytes:
        """Pickle `value`, with local classes by name."""
        file = io.BytesIO()
        _Pickler(file, self).dump(value)
        return file.getvalue()

    def unpickled(self, payload: bytes) -> object:
        """Unpickle what another rank's `pickled` returned."""
        return _Unpickler(io.BytesIO(payload), self).load()

    def name(self, cls: type) -> _Named:
        """Return what another rank needs to find its own `cls`."""
        if cls not in self._names:
            same = _named(cls.__module__, cls.__qualname__)
            fields, is_tuple = _fields(cls), issubclass(cls, tuple)
            place = (same.index(cls), len(same))
            self._names[cls] = (cls.__module__, cls.__qualname__, *place, is_tuple, fields)
        return self._names[cls]

    def find(self, name: _Named) -> type:
        """Return this rank's class of that name."""
        if name not in self._found:
            module, qualname, index, number, is_tuple, fields = name
            same = [c for c in _named(module, qualname) if _fields(c) == fields]
            if same:
                self._found[name] = same[index if number == len(same) else -1]
            else:
                self._found[name] = _made(module, qualname, fields, is_tuple=is_tuple)
        return self._found[name]


class _Pickler(pickle.Pickler):
    def __init__(self, file: IO[bytes], classes: LocalClasses) -> None:
        super().__init__(file)
        self._classes = classes

    def persistent_id(self, obj: object) -> _Named | None:
        if isinstance(obj, type) and _LOCAL in obj.__qualname__:
            return self._classes.name(obj)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], classes: LocalClasses) -> None:
        super().__init__(file)
        self._classes = classes

    def persistent_load(self, pid: Any) -> type:
        return self._classes.find(pid)


def _named(module: str, qualname: str) -> list[type]:
    """Return all live classes of that name, in order of creation."""
    gc.collect()  # processes may differ in which dead classes they still keep
    seen: dict[type, None] = {}
    _walk(object, seen)
    return [cls for cls in seen if cls.__module__ == module and cls.__qualname__ == qualname]


def _walk(cls: type, seen: dict[type, None]) -> None:
    """Add all subclasses of `cls`, recursively."""
    subclasses: list[type] = type.__subclasses__(cls)
    for below in subclasses:
        if below not in seen:
            seen[below] = None
            _walk(below, seen)


def _fields(cls: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return tuple(getattr(cls, "_fields", ()))


def _made(module: str, qualname: str, fields: tuple[str, ...], *, is_tuple: bool) -> type:
    name = qualname.rsplit(".", 1)[-1]
    make: Callable[..., Any] = collections.namedtuple if is_tuple else dataclasses.make_dataclass
    made: type = make(name, fields)
    made.__module__, made.__qualname__ = module, qualname
    return made
