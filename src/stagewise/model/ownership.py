"""Assign parameters and buffers to the cells that use them, and unused ones to the nearest cell.

A cell holds a layer of torch.nn that it calls as it is. Another module may be spread over many
cells: each holds the tensors it uses, in a Holder with the same attribute names.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from stagewise.model.cell import Holder
from stagewise.model.namespace import CellNamespace

V = TypeVar("V")


def owners_of(
    model: nn.Module, leaves: Mapping[str, nn.Module], namespaces: Sequence[CellNamespace]
) -> list[list[tuple[int, str, nn.Module]]]:
    """Return what every cell holds: (place in `model`'s order, path, module or Holder).

    Every name of the model's parameters and buffers occurs at least once.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {module: path for path, module in reversed(modules.items())}
    cells: list[dict[str, nn.Module]] = [{} for _ in namespaces]
    for cell, namespace in zip(cells, namespaces, strict=True):
        for path in sorted(namespace.leaves):
            cell[path] = leaves[path]
        for name in sorted(namespace.states):
            _hold(cell, model, name)
            holder = cell.get(name.rpartition(".")[0])
            known, changed = namespace.changed is not None, namespace.changed or ()
            if isinstance(holder, Holder) and known and name not in changed:
                holder.constant.add(name.rpartition(".")[2])
    for path, module in modules.items():  # other names of held layers
        for cell in cells:
            if path not in cell and module in cell.values() and not is_inside(path, cell):
                cell[path] = module
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in everything:
        if any(_has(cell, name) for cell in cells):
            continue
        cell = _nearest(cells, name, tensor)
        path = name.rpartition(".")[0]
        leaf = first[modules[path]]
        whole = next((p for p in leaves if leaf == p or leaf.startswith(f"{p}.")), None)
        if whole is not None and whole == leaf:
            cell[path] = leaves[whole]
        else:
            _hold(cell, model, name)
    for cell in cells:
        for path, held in cell.items():
            if isinstance(held, Holder):
                _sort(held._parameters, modules[path]._parameters)
                _sort(held._buffers, modules[path]._buffers)
    order = {path: index for index, path in enumerate(modules)}
    return [sorted((order[path], path, module) for path, module in cell.items()) for cell in cells]


def _hold(cell: dict[str, nn.Module], model: nn.Module, name: str) -> None:
    """Make `cell` hold the parameter or buffer `name`."""
    if _has(cell, name):
        return
    path, _, attribute = name.rpartition(".")
    source = model.get_submodule(path)
    holder = cell.get(path)
    if not isinstance(holder, Holder):
        holder = cell[path] = Holder((*source._parameters, *source._buffers))
        holder.training = source.training
    if attribute in source._parameters:
        holder.register_parameter(attribute, source._parameters[attribute])
    else:
        persistent = attribute not in source._non_persistent_buffers_set
        holder.register_buffer(attribute, source._buffers[attribute], persistent=persistent)


def _sort(held: dict[str, V], order: Iterable[str]) -> None:
    held.update({name: held.pop(name) for name in order if name in held})


def _has(cell: Mapping[str, nn.Module], name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    for held, module in cell.items():
        if path == held:
            return attribute in module._parameters or attribute in module._buffers
        if not isinstance(module, Holder) and path.startswith(f"{held}."):
            return True
    return False


def is_inside(path: str, modules: Iterable[str]) -> bool:
    """Return whether `path` names something in one of `modules`, given by their paths."""
    return any(path.startswith(f"{module}.") for module in modules)


def _nearest(
    cells: Sequence[dict[str, nn.Module]], name: str, tensor: torch.Tensor
) -> dict[str, nn.Module]:
    """Return the cell that holds `tensor` under another name, else the one nearest to `name`."""
    for cell in cells:
        for module in cell.values():
            if any(tensor is held for held in (*module.parameters(), *module.buffers())):
                return cell
    parts = name.split(".")

    def shared(cell: Iterable[str]) -> int:
        return max((_common(parts, path.split(".")) for path in cell), default=0)

    return max(cells, key=shared)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
