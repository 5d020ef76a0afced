"""Which tensors of a chain are on the meta device, where they are kept, and who can fill them."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from stagewise.errors import ModelError
from stagewise.model.cell import Cell, Chain, Holder

Init = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Keeper:
    """The module and attribute where a cell keeps a tensor."""

    name: str  # in the plain model
    module: nn.Module
    attribute: str

    def get(self) -> torch.Tensor | None:
        kept = self.module._parameters.get(self.attribute)
        return self.module._buffers.get(self.attribute) if kept is None else kept

    def put(self, tensor: torch.Tensor) -> None:
        setattr(self.module, self.attribute, tensor)  # nn.LSTM and the like also keep a list

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


@dataclass
class MetaTensor:
    """A tensor on the meta device and its places; it is initialised at the first."""

    tensor: torch.Tensor
    places: list[Keeper] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    cells: set[int] = field(default_factory=set)  # that use it

    @property
    def is_buffer(self) -> bool:
        return not isinstance(self.tensor, nn.Parameter)

    @property
    def is_saved(self) -> bool:
        """Whether it is in the state_dict."""
        first = self.places[0]
        return first.attribute not in first.module._non_persistent_buffers_set


@dataclass(frozen=True)
class Part:
    """A module to initialise, and its initialiser besides its own `reset_parameters`."""

    path: str
    module: nn.Module
    init: Init | None
    is_around: bool = False  # it also contains other cells


def is_meta(chain: Chain) -> bool:
    """Return whether the model is on the meta device; ModelError if only a part of it is.

    Buffers may have values in a model whose parameters are on the meta device.
    """
    tensors = [
        (_name(path, name), tensor)
        for cell in chain
        for path, module in cell.named_modules()
        for kept in (module._parameters, module._buffers)
        for name, tensor in kept.items()
        if tensor is not None
    ]
    metas = [(name, tensor) for name, tensor in tensors if tensor.is_meta]
    reals = [
        (name, tensor)
        for name, tensor in tensors
        if isinstance(tensor, nn.Parameter) and not tensor.is_meta
    ]
    if metas and reals:
        raise ModelError(
            f"the model is partly on the meta device: {metas[0][0]} is, {reals[0][0]} is on "
            f"{reals[0][1].device}; build all of it under torch.device('meta'), or none of it "
            "(a Pipeline materialises its own stages); pass trained values to Pipeline as "
            "state={name: tensor}, or as the path of a checkpoint"
        )
    return bool(metas)


def entries_of(chain: Chain, model: nn.Module | None) -> list[MetaTensor]:
    """Return the model's tensors on the meta device, in its order.

    Tensors in a Holder of a captured model's cell are initialised in the original module.
    """
    entries: dict[int, MetaTensor] = {}
    for cell in chain:
        for path, module in cell.named_modules(remove_duplicate=False):
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or not tensor.is_meta:
                    continue
                entry = entries.setdefault(id(tensor), MetaTensor(tensor))
                name = _name(path, attribute)
                entry.names.append(name)
                entry.cells.add(cell.index)
                for keeper in dict.fromkeys((_original(path, module, model), module)):
                    if all((p.module, p.attribute) != (keeper, attribute) for p in entry.places):
                        entry.places.append(Keeper(name, keeper, attribute))
    return list(entries.values())


def parts_of(cell: Cell, model: nn.Module | None, init: Init | None) -> Iterator[Part]:
    """Yield the cell's modules, children first as their constructors ran, then those around it."""
    seen: set[nn.Module] = set()
    around: dict[str, Part] = {}

    def inside(name: str, module: nn.Module, hook: Init | None) -> Iterator[Part]:
        if module in seen:
            return
        seen.add(module)
        hook = init or _own_init(module) or hook
        for child_name, child in module.named_children():
            yield from inside(f"{name}.{child_name}", child, hook)
        yield Part(name, module, hook)

    for path, module in reversed(list(cell.roots())):
        hook = init
        for prefix in _above(path) if model is not None else ():
            assert model is not None
            outer = model.get_submodule(prefix)
            hook = init or _own_init(outer) or hook
            around.setdefault(prefix, Part(prefix, outer, hook, is_around=True))
        if isinstance(module, Holder):
            original = _original(path, module, model)
            yield Part(path, original, init or _own_init(original) or hook)
        else:
            yield from inside(path, module, hook)
    yield from sorted(around.values(), key=lambda part: len(_above(part.path)), reverse=True)


def _above(path: str) -> list[str]:
    """Return the paths of the modules around `path`, the model's own first."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) if path else 0)]


def _original(path: str, module: nn.Module, model: nn.Module | None) -> nn.Module:
    """Return the model's own module if `module` is a Holder for it."""
    return model.get_submodule(path) if model is not None and isinstance(module, Holder) else module


def _name(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def _own_init(module: nn.Module) -> Init | None:
    """Return the module's `_init_weights`, if it takes a module."""
    hook = getattr(module, "_init_weights", None)
    if not callable(hook):
        return None
    try:
        inspect.signature(hook).bind(module)
    except (TypeError, ValueError):
        return None
    return cast(Init, hook)
