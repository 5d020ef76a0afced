"""A captured cell's code, and the names that it refers to; plain data that can be pickled."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

Contexts = AbstractContextManager[Any]


class Code:
    """A function, as its source and the globals that it uses."""

    def __init__(self, source: str, scope: Mapping[str, Any]) -> None:
        self._source, self._scope = source, dict(scope)
        made = dict(scope)
        exec(compile(source, "<stagewise cell>", "exec"), made)
        self.function: Callable[..., Any] = made["forward"]

    def __reduce__(self) -> tuple[object, ...]:
        modules = {n: v.__name__ for n, v in self._scope.items() if isinstance(v, ModuleType)}
        others = {n: v for n, v in self._scope.items() if n not in modules}
        return _code_of, (self._source, modules, others)

    def __deepcopy__(self, memo: dict[int, object]) -> "Code":
        return self  # nothing in it changes


def _code_of(source: str, modules: Mapping[str, str], others: Mapping[str, Any]) -> Code:
    return Code(source, {**others, **{n: import_module(name) for n, name in modules.items()}})


def _gradients(kind: str, enabled: bool) -> Contexts:
    return torch.set_grad_enabled(enabled)


def _autocast(
    kind: str, _: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None
) -> Contexts:
    return torch.autocast(kind, dtype, enabled, cache_enabled)


CONTEXTS: Mapping[str, Callable[..., Contexts]] = {
    "wrap_with_set_grad_enabled": _gradients,
    "wrap_with_autocast": _autocast,
}


@dataclass(frozen=True)
class Region:
    """Operators that run with gradients disabled, or under their own autocast."""

    code: Code
    context: str  # a key of CONTEXTS
    arguments: tuple[Any, ...]

    def __call__(self, space: SimpleNamespace, *args: object) -> object:
        with CONTEXTS[self.context](space.device.type, *self.arguments):
            return self.code.function(space, *args)


@dataclass
class CellNamespace:
    """The names under which one cell keeps what its code uses; shared by its functions.

    `device` is that of the trace; `states` are the names of parameters and buffers that operators
    use, `changed` those that some cell changes, `leaves` the paths of layers that are called,
    `constants` and `kept` the tensors and other objects that belong to the code.
    """

    device: torch.device
    owners: dict[str, str] = field(default_factory=dict)  # path of a module -> its name here
    states: set[str] = field(default_factory=set)
    changed: set[str] | None = None  # None: unknown
    leaves: set[str] = field(default_factory=set)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, object] = field(default_factory=dict)

    def owner(self, path: str) -> str:
        """Return the name under which the module at `path` is kept."""
        return self.owners.setdefault(path, f"m{len(self.owners)}")

    def state(self, name: str) -> str:
        """Return the expression for a parameter or buffer."""
        self.states.add(name)
        path, _, attribute = name.rpartition(".")
        return f"{self.owner(path)}.{attribute}"

    def leaf(self, path: str) -> str:
        """Return the expression for a layer to call."""
        self.leaves.add(path)
        return self.owner(path)

    def constant(self, tensor: torch.Tensor) -> str:
        """Return the expression for a tensor created in forward."""
        known = [name for name, other in self.constants.items() if other is tensor]
        name = known[0] if known else f"c{len(self.constants)}"
        self.constants[name] = tensor
        return f"constants.{name}"

    def keep(self, value: object) -> str:
        """Return the expression for any other object."""
        name = f"k{len(self.kept)}"
        self.kept[name] = value
        return name
