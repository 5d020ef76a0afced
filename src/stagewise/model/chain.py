"""A model as a chain of cells: the smallest pieces that a partition never cuts.

Nested `nn.Sequential`s are flattened. A Sequential that is more than its children (own forward or
`train`, hooks, parameters or buffers) stays one cell, since flattening would lose what it adds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.parameter import is_lazy

from stagewise.errors import ModelError
from stagewise.model.signature import parameter_names
from stagewise.model.skip import NO_SKIPS, CellSkips, Scope, SkipScope, check_skips, enter, skips_of


@dataclass(frozen=True)
class Cell:
    """One cell: its position in the chain, its path in the model (`"0.1"`), module and skips."""

    index: int
    name: str
    module: nn.Module
    skips: CellSkips = NO_SKIPS

    def keywords(self, num_args: int = 1) -> tuple[str, ...]:
        """What `forward` takes by name beside `num_args` positional arguments."""
        positional, keyword_only = self._parameter_names
        return positional[num_args:] + keyword_only

    @cached_property
    def _parameter_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return parameter_names(self.module)


Chain = tuple[Cell, ...]


def chain_of(model: nn.Module | Sequence[nn.Module]) -> Chain:
    """Return the model's cells in running order.

    `model` is an `nn.Sequential` (nested ones are flattened) or a list of modules; raises
    ModelError for anything else, naming what to pass, and for skips that do not pair up.
    """
    scopes: tuple[Scope, ...] = ()
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
        if not _is_plain_sequential(model):
            changed = sorted({n for cls in type(model).__mro__ for n in _overridden(cls)})
            why = f" (its own {', '.join(changed)} would be lost)" if changed else ""
            raise ModelError(
                f"{type(model).__name__} is no chain of cells{why}: stagewise needs an "
                "nn.Sequential or a list of modules, each fed with what the one before it returns; "
                "wrap the model's layers in nn.Sequential(...)"
            )
        children = [(n, m) for n, m in model._modules.items() if m is not None]
        scopes = enter((), "", model)
    else:
        children = []
        for index, module in enumerate(model):
            if not isinstance(module, nn.Module):
                raise ModelError(
                    f"item {index} of the list of layers is a {type(module).__name__}; "
                    "every item must be an nn.Module"
                )
            children.append((str(index), module))
    named = [found for name, child in children for found in _flatten(name, child, scopes)]
    for name, module, _ in named:
        if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            raise ModelError(
                f"cell {name!r} ({type(module).__name__}) is lazy: its parameters have no shape "
                "yet; run the model once on a sample, then cut it"
            )
    if not named:
        raise ModelError("the model has no cells; give it at least one layer")
    chain = tuple(
        Cell(index, name, module, skips_of(name, module, around))
        for index, (name, module, around) in enumerate(named)
    )
    check_skips((cell.name, cell.skips) for cell in chain)
    return chain


def module_tree(cells: Sequence[Cell]) -> nn.Module:
    """A module that holds `cells` under their paths, so that all names are the plain model's."""
    root = nn.Module()
    for cell in cells:
        *path, leaf = cell.name.split(".")
        parent = root
        for name in path:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(leaf, cell.module)
    return root


def _flatten(
    name: str, module: nn.Module, scopes: tuple[Scope, ...]
) -> Iterator[tuple[str, nn.Module, tuple[Scope, ...]]]:
    if not (_is_plain_sequential(module) and len(list(module.children()))):
        yield name, module, scopes
        return
    scopes = enter(scopes, name, module)
    for child_name, child in module._modules.items():
        assert child is not None
        yield from _flatten(f"{name}.{child_name}", child, scopes)


def _is_plain_sequential(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return (
        isinstance(module, nn.Sequential)
        and not any(map(_overridden, type(module).__mro__))
        and "forward" not in module.__dict__
        and not any(hooks)
        and not any(module._parameters)
        and not any(module._buffers)
    )


def _overridden(cls: type) -> list[str]:
    """What a subclass of Sequential has in place of Sequential's own: flattening would lose it."""
    if not issubclass(cls, nn.Sequential) or cls in (SkipScope, nn.Sequential):
        return []
    return [n for n in vars(cls) if hasattr(nn.Sequential, n) and n not in _OWN_NAMES]


# What every class has of its own, and what only runs before the model is cut.
_OWN_NAMES = {
    *vars(type("Empty", (nn.Sequential,), {"__annotations__": {}})),
    "__init__",
    "T_destination",
}
