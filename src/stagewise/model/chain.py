"""A model as a chain of cells: the units that a partition never cuts.

Nested `nn.Sequential`s are flattened. A Sequential that is more than its children (own forward or
`train`, hooks, parameters or buffers) stays one cell, since flattening would lose what it adds.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from stagewise.batch.layouts import is_sharded
from stagewise.errors import ModelError
from stagewise.model.captured import Captured, captured_of, changed_of
from stagewise.model.cell import Cell, Chain, Holder, Piece
from stagewise.model.skip import SkipScope
from stagewise.model.skip_pairs import Scope, between_cells, check_skips, enter, skips_of

V = TypeVar("V")
Held = nn.Module | Sequence[nn.Module]  # what holds cells
Model = Held | Captured  # what chain_of takes


def chain_of(model: Model) -> Chain:
    """Return the model's cells in running order.

    `model` is an `nn.Sequential` (nested ones are flattened), a list of modules, or a captured
    module (`stagewise.capture`). ModelError, with a remedy, for anything else and for skips that do
    not pair up.
    """
    captured = captured_of(model)
    if captured is not None:
        return captured.chain
    children, scopes = _children_of(model)
    named = [found for name, child in children for found in _flatten(name, child, scopes)]
    if not named:
        raise ModelError("the model has no cells; give it at least one layer")
    for name, module, _ in named:
        if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            raise ModelError(
                f"cell {name!r} ({type(module).__name__}) is lazy: its parameters have no shape "
                "yet; run the model once on a sample, then cut it"
            )
    skips = between_cells(
        [(name, skips_of(name, module, around)) for name, module, around in named]
    )
    chain = tuple(
        Cell(index, name, module, own)
        for index, ((name, module, _), own) in enumerate(zip(named, skips, strict=True))
    )
    check_skips((cell.name, cell.skips) for cell in chain)
    return chain


def refuse_sharded(model: Model) -> None:
    """Raise ModelError for a model whose parameters are already spread over ranks."""
    if isinstance(model, nn.Module):
        roots = [("", model)]
    else:
        roots = [] if isinstance(model, Captured) else children_in(model)
    modules = [(at, root) for at, root in roots if isinstance(root, nn.Module)]
    named = ((f"{at}.{n}".lstrip("."), p) for at, m in modules for n, p in m.named_parameters())
    if found := [name for name, parameter in named if is_sharded(parameter)]:
        raise ModelError(
            f"{', '.join(found[:3])} ({len(found)} parameters) are DTensors already: the model was "
            "sharded or parallelised before it was cut into stages; give the plain model, and do "
            "that to each stage: Pipeline(..., mesh=mesh, parallelize=fn) calls "
            "fn(stage, mesh, index)"
        )


def _children_of(model: Model) -> tuple[list[tuple[str, nn.Module]], tuple[Scope, ...]]:
    """Return the named modules of a Sequential or list, and the scopes around them."""
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
        if not is_chain(model):
            raise _not_a_chain(model)
        return children_in(model), enter((), "", model)
    assert not isinstance(model, Captured)
    given: object = model  # whatever a user passes
    if isinstance(given, str) or not isinstance(given, Sequence | nn.ModuleList):
        call = f"; write {given.__name__}(...)" if isinstance(given, type) else ""
        raise ModelError(
            f"the model is {given!r}, and no nn.Module or list of them{call}; functions can be "
            "wrapped in a module"
        )
    for index, module in enumerate(model):
        if not isinstance(module, nn.Module):
            raise ModelError(
                f"item {index} of the list of layers is a {type(module).__name__}; "
                "every item must be an nn.Module"
            )
    return children_in(model), ()


def _not_a_chain(model: nn.Module) -> ModelError:
    if since := changed_of(model):
        return ModelError(
            f"{', '.join(since[:3])} of {type(model).__name__} changed after it was captured; call "
            "stagewise.capture again (or stagewise.plan with an example) to update its cells"
        )
    changed = sorted({n for cls in type(model).__mro__ for n in _overridden(cls)})
    why = f" (its own {', '.join(changed)} would be lost)" if changed else ""
    return ModelError(
        f"{type(model).__name__} is not a sequence of cells{why} and has not been captured; call "
        "stagewise.capture(model, *args, **kwargs) with an example of its arguments first "
        "(stagewise.plan does so if given an example; with cells=[...] it uses modules of the "
        "model as its cells), or pass an nn.Sequential or a list of modules, each taking the "
        "previous one's output"
    )


def sequences_in(model: Model, path: str = "") -> Iterator[tuple[str, Held]]:
    """Yield the Sequentials and lists whose children `chain_of` takes as cells, by their paths."""
    if isinstance(model, Captured) or captured_of(model) is not None:
        return
    yield path, model
    for name, child in children_in(model):
        if _is_plain_sequential(child):
            yield from sequences_in(child, f"{path}.{name}".lstrip("."))


def children_in(sequence: Held) -> list[tuple[str, nn.Module]]:
    """Return the children of a Sequential or list, by name."""
    if isinstance(sequence, nn.Module):
        return [(name, child) for name, child in sequence._modules.items() if child is not None]
    return [(str(index), child) for index, child in enumerate(sequence)]


def is_chain(model: nn.Module) -> bool:
    """Return whether `chain_of` accepts the module without a capture."""
    return isinstance(model, nn.ModuleList) or _is_plain_sequential(model)


def module_tree(cells: Sequence[Cell]) -> nn.Module:
    """Return a module that holds `cells` under their paths, with the plain model's names.

    Its `train` and `eval` also reach cells that it does not contain as modules.
    """
    held: list[tuple[int, str, nn.Module]] = []
    for cell in cells:
        module = cell.module
        held += module.owned() if isinstance(module, Piece) else [(-1, cell.name, module)]
    at: dict[str, list[nn.Module]] = {}
    for _, path, module in sorted(held, key=lambda item: item[0]):
        at.setdefault(path, []).append(module)
    root = _Root(cells)
    for path, modules in at.items():
        whole = next((module for module in modules if not isinstance(module, Holder)), None)
        if path and whole is not None:
            _node(root, path, whole)
        else:
            _adopt(_node(root, path), modules)
    return root


def cells_in(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return what runs as the cells of a `module_tree`; nothing for other modules."""
    return module._cells if isinstance(module, _Root) else ()


class _Root(nn.Module):
    def __init__(self, cells: Sequence[Cell]) -> None:
        super().__init__()
        self._cells = tuple(cell.module for cell in cells)

    def train(self, mode: bool = True) -> "_Root":
        super().train(mode)
        for cell in self._cells:
            cell.train(mode)
        return self


def _node(root: nn.Module, path: str, module: nn.Module | None = None) -> nn.Module:
    """Return the module at `path` below `root`: `module`, or a new one."""
    parent = root
    *above, leaf = path.split(".") if path else [""]
    for name in above:
        if name not in parent._modules:
            parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    if path and (module is not None or leaf not in parent._modules):
        parent.add_module(leaf, module if module is not None else nn.Module())
    return parent.get_submodule(leaf)


def _adopt(node: nn.Module, holders: Sequence[nn.Module]) -> None:
    """Give `node` the tensors of `holders`; of a single one its very dicts, so both stay equal."""
    first, *others = holders
    node._parameters, node._buffers = first._parameters, first._buffers
    node._non_persistent_buffers_set = first._non_persistent_buffers_set
    if others:
        node._parameters, node._buffers = dict(node._parameters), dict(node._buffers)
        node._non_persistent_buffers_set = set(node._non_persistent_buffers_set)
    for holder in others:
        node._parameters.update(holder._parameters)
        node._buffers.update(holder._buffers)
        node._non_persistent_buffers_set |= holder._non_persistent_buffers_set
    if others and isinstance(first, Holder):
        node._parameters = _in_order(node._parameters, first.order)
        node._buffers = _in_order(node._buffers, first.order)


def _in_order(held: dict[str, V], order: Sequence[str]) -> dict[str, V]:
    return {name: held[name] for name in order if name in held}


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
    """Return what a subclass of Sequential overrides, which flattening would lose."""
    if not issubclass(cls, nn.Sequential) or cls in (SkipScope, nn.Sequential):
        return []
    return [n for n in vars(cls) if hasattr(nn.Sequential, n) and n not in _OWN_NAMES]


# Attributes that every class has, and those that only matter before the model is cut.
_OWN_NAMES = {
    *vars(type("Empty", (nn.Sequential,), {"__annotations__": {}})),
    "__init__",
    "T_destination",
}
