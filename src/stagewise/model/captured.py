"""Captures of models that are not a chain themselves, remembered by model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import nn

from stagewise.model.cell import Holder, Piece
from stagewise.model.forward.watch import Place, Watch

if TYPE_CHECKING:
    from stagewise.model.cell import Cell


class CapturedForm(Protocol):
    """The arguments that a model was captured with."""

    def bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        """Return the arguments that cells take, by name."""

    def takes(self, name: str) -> bool:
        """Return whether some cell takes the argument `name`."""

    def matches(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Return whether a call has arguments of the same form, except for the batch size."""


class Captured:
    """A model as a chain of cells, made by `stagewise.capture`; calling it runs the model.

    `chain` holds the cells, with the model's own parameters; `form` what a call must pass; `watch`
    notices changes of the model since the capture, other than those its forward makes itself.
    """

    def __init__(self, chain: tuple[Cell, ...], form: CapturedForm) -> None:
        self.chain, self.form = chain, form
        self.own_changes: frozenset[Place] = frozenset()
        self.asks_flags = False  # whether forward reads requires_grad of tensors
        self.watch: Watch | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        given = self.form.bind(args, kwargs)
        value: object = ()
        for cell in self.chain:
            names = cell.keywords(cell.index and 1)
            value = cell.module(value, **{name: given[name] for name in names if name in given})
        return value


# By model, so that Pipeline(model, plan) finds the capture of plan(model, ...).
_CAPTURED: weakref.WeakKeyDictionary[nn.Module, Captured] = weakref.WeakKeyDictionary()


_MODULES: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[nn.Module]]] = (
    weakref.WeakKeyDictionary()
)  # the model's submodules when it was captured


def remember(model: nn.Module, captured: Captured) -> None:
    """Use `captured` for `model` while that lives and does not change."""
    pieces = [cell.module for cell in captured.chain if isinstance(cell.module, Piece)]
    runs_itself = [module for piece in pieces for module in piece.modules()]
    captured.watch = Watch(model, runs_itself, captured.own_changes, asks_flags=captured.asks_flags)
    for piece in pieces:
        piece.watch = captured.watch
    _CAPTURED[model] = captured
    _MODULES[model] = {path: weakref.ref(module) for path, module in _inside(model)}


def captured_of(model: object) -> Captured | None:
    """Return the capture of `model`; None if there is none, or the model has changed since."""
    if isinstance(model, Captured):
        return model
    if not isinstance(model, nn.Module) or model not in _CAPTURED:
        return None
    now = {path: weakref.ref(module) for path, module in _inside(model)}
    captured = _CAPTURED[model]
    same = now == _MODULES[model] and not _replaced(model, captured)
    return captured if same and not changed_of(model) else None


def changed_of(model: object) -> list[str]:
    """Return the names of what changed in the model since it was captured."""
    captured = _CAPTURED.get(model) if isinstance(model, nn.Module) else None
    return [] if captured is None or captured.watch is None else captured.watch.changed()


def _inside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in model.named_modules() if path)


def _replaced(model: nn.Module, captured: Captured) -> bool:
    """Return whether a holder has a parameter that is no longer the model's own.

    A model's parameter on the meta device has been materialised in the holder.
    """
    return any(
        own is not held and not (own is not None and own.is_meta)
        for cell in captured.chain
        if isinstance(cell.module, Piece)
        for _, path, holder in cell.module.owned()
        if isinstance(holder, Holder)
        for name, held in holder._parameters.items()
        for own in [model.get_submodule(path)._parameters.get(name)]
    )
