"""Notice changes of libraries since a model was captured.

Their code is assumed fixed, but a patch may replace one of their functions, or the forward of a
class, and flags of torch (default dtype and device, `torch.backends`) may change. So the values of
the modules' names that forward's code uses are remembered.
"""

import types
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType

import torch
from torch import nn
from torch.nn import functional

from stagewise.model.forward.contents import PLAIN, is_fixed
from stagewise.model.forward.users_code import is_torchs
from stagewise.model.forward.visible import globals_in, is_own, names_in

_MOST_FUNCTIONS = 1000
_DTYPE, _DEVICE = "torch's default dtype", "torch's default device"
# Function that code names -> the flag that it depends on.
_FLAGS: dict[str, tuple[str, Callable[[], object]]] = {
    name: (name, getattr(torch, name))
    for name in (
        *("are_deterministic_algorithms_enabled", "get_float32_matmul_precision"),
        *("is_deterministic_algorithms_warn_only_enabled", "get_num_threads"),
    )
} | dict.fromkeys(
    (
        *("zeros", "ones", "empty", "full", "arange", "linspace", "eye", "tensor", "as_tensor"),
        *("rand", "randn", "randint", "randperm", "normal", "scalar_tensor", "get_default_device"),
    ),
    (_DEVICE, torch.get_default_device),
)
_CALLABLE = (FunctionType, types.BuiltinFunctionType, type, torch.jit.ScriptFunction)
_GONE = object()


class Library:
    """Remembers what functions in `seen`, and the forwards of `modules`, use from libraries."""

    def __init__(self, seen: Iterable[object], modules: Iterable[nn.Module]) -> None:
        forwards = {type(module): type(module).forward for module in modules}
        self._used: dict[tuple[int, str], tuple[object, str, object]] = {}
        for name, value in vars(functional).items():  # reached from anywhere
            if isinstance(value, _CALLABLE):
                self._used[id(functional), name] = functional, name, value
        for kind, forward in forwards.items():
            if is_fixed(kind):
                self._used[id(kind), "forward"] = kind, "forward", forward
        self._flags: dict[str, Callable[[], object]] = {_DTYPE: torch.get_default_dtype}
        waiting = [f for f in (*seen, *forwards.values()) if isinstance(f, FunctionType)]
        known = {id(function) for function in waiting}
        for function in waiting:  # grows meanwhile
            names = names_in(function.__code__)
            self._flags |= dict(_FLAGS[name] for name in names & _FLAGS.keys())
            for value in self._of(function, names):
                if not isinstance(value, FunctionType) or is_torchs(value.__code__.co_filename):
                    continue
                if id(value) not in known and len(waiting) < _MOST_FUNCTIONS:
                    known.add(id(value))
                    waiting.append(value)
        if torch.get_default_device().type == "meta":  # only while it is captured
            self._flags.pop(_DEVICE, None)
        self._answers = {name: ask() for name, ask in self._flags.items()}

    def _of(self, function: FunctionType, names: frozenset[str]) -> Iterator[object]:
        """Yield, and remember, what a function uses from modules."""
        known = function.__globals__
        library = not is_own(function.__code__.co_filename)
        for name in globals_in(function.__code__) & known.keys():
            value = known[name]
            if isinstance(value, ModuleType):
                if not is_own(_file_of(value)):
                    yield from self._of_module(value, names)
            elif library and isinstance(value, _CALLABLE):
                self._used[id(known), name] = known, name, value
                yield value

    def _of_module(self, module: ModuleType, names: frozenset[str]) -> Iterator[object]:
        own, kind = vars(module), vars(type(module))
        for name in names:
            if (name not in own and name not in kind) or (id(module), name) in self._used:
                continue
            value = getattr(module, name, _GONE)
            if isinstance(value, ModuleType):
                self._used[id(module), name] = module, name, value
                yield from self._of_module(value, names)
            elif isinstance(value, _CALLABLE) or (
                isinstance(value, PLAIN) and is_torchs(_file_of(module)) and name[:2] != "__"
            ):
                self._used[id(module), name] = module, name, value
                yield value

    def changed(self) -> list[str]:
        """Return the names of what has changed."""
        found = [name for name, ask in self._flags.items() if ask() != self._answers[name]]
        for owner, name, value in self._used.values():
            now = owner.get(name, _GONE) if type(owner) is dict else getattr(owner, name, _GONE)
            if now is not value and not (isinstance(value, PLAIN) and now == value):
                where = owner.get("__name__") if type(owner) is dict else _name_of(owner)
                found.append(f"{where}.{name}")
        return found


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "<"


def _name_of(owner: object) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return str(getattr(owner, "__name__", owner))
