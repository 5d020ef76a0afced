"""Snapshots of what the same code sees, taken one after the other.

Problem: to walk through everything that a forward can see takes milliseconds, and a look takes a
snapshot before and after every run. Idea: the first one walks; those after it compare, object by
object, which values are in the same places. Where only numbers, texts and tensors were replaced,
the objects that hold them are read again; where something was that itself holds others, all is
walked again.
"""

import sys
from collections.abc import Callable, Sequence
from operator import is_
from types import FunctionType
from typing import Any

from torch import nn

from stagewise.model.forward.slots import Key, Slot, Snapshot, slots_in, stores_in
from stagewise.model.forward.users_code import HOOKS
from stagewise.model.forward.visible import Node, Sight, is_own

_MOST_ITEMS = 4096  # of a container of which more than a digest is seen
_REGISTRIES = ("_parameters", "_buffers", "_modules", *HOOKS)


class Viewpoint:
    """What `codes`, modules or functions, see. It keeps alive what it has seen.

    It begins with the names that `sight` knows, which learns those of this code. What other code
    names later is not seen: it would look like an attribute that this code has added.
    """

    def __init__(self, sight: Sight, *codes: Any) -> None:
        self._shared, self._sight, self._codes = sight, sight.apart(), codes
        self._nodes: list[Node] = []
        self._places: list[Sequence[object]] = []  # of each node, the values in it
        self._keys: list[list[Key]] = []  # of each node, the slots found in it first
        self._slots: dict[Key, Slot] = {}
        self._holders: set[int] = set()

    def take(self) -> Snapshot:
        """Return the current slots that the codes can write to."""
        if self._nodes and self._read_again():
            self._slots = {key: slot.now() for key, slot in self._slots.items()}
        else:
            self._walk()
        return Snapshot(self._slots, self._holders)

    def _walk(self) -> None:
        self._nodes = self._sight.walk(*self._codes)
        self._shared.learn(self._sight)
        self._places = [self._places_of(node.value) for node in self._nodes]
        self._holders = {id(store) for node in self._nodes for store in stores_in(node.value)}
        self._slots, self._keys = {}, []
        for node in self._nodes:
            self._keys.append(self._found(node))

    def _found(self, node: Node) -> list[Key]:
        new = [(key, slot) for key, slot in slots_in(node) if key not in self._slots]
        self._slots.update(new)
        return [key for key, _ in new]

    def _read_again(self) -> bool:
        """Bring the slots up to date without a walk; return False if that cannot be done."""
        places = [self._places_of(node.value) for node in self._nodes]
        self._slots = dict(self._slots)  # the last snapshot has the others
        for index, (before, now) in enumerate(zip(self._places, places, strict=True)):
            if len(before) == len(now) and all(map(is_, before, now)):
                continue
            known, left = {*map(id, before)}, {*map(id, now)}
            apart = [v for v in before if id(v) not in left]
            apart += [v for v in now if id(v) not in known]
            if any(map(self._sight.holds, apart)):
                return False
            old = self._nodes[index]
            items = self._sight.items(old.value)
            self._nodes[index] = node = Node(old.path, old.value, items, old.parent, old.place)
            for key in self._keys[index]:
                del self._slots[key]
            self._keys[index] = self._found(node)
        self._places = places
        return True

    def _places_of(self, value: Any) -> Sequence[object]:
        """Return names and values in `value`, the same objects as long as nothing is replaced."""
        kind = type(value)
        if isinstance(value, nn.Module):
            own = vars(value)
            held = [item for each in _REGISTRIES for item in (*own[each], *own[each].values())]
            return [kind, *own, *own.values(), *held]
        read = _OF_KINDS.get(kind)
        if read is not None and len(value) <= _MOST_ITEMS:
            return read(value)
        if isinstance(value, type):
            return [*vars(value), *vars(value).values(), *value.__bases__]
        if isinstance(value, FunctionType) and not is_own(value.__code__.co_filename):
            return _of_function(value)
        return [
            part for name, held in self._sight.items(value) for part in (sys.intern(name), held)
        ]


def _of_function(value: FunctionType) -> Sequence[object]:
    """Return what a function of a library holds, whose globals are not looked at."""
    own, closed = vars(value), value.__closure__ or ()
    try:
        held = [cell.cell_contents for cell in closed]
    except ValueError:  # one is not assigned yet
        held = [*closed, None]
    named = value.__kwdefaults__ or {}
    return [value.__code__, value.__defaults__, *named, *named.values(), *own, *own.values(), *held]


_OF_KINDS: dict[type, Callable[[Any], Sequence[object]]] = {
    dict: lambda value: [*value, *value.values()],
    list: list.copy,
    tuple: list,
    set: list,
}
