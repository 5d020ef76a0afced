"""What was captured of models that are no chain by themselves, and where it is remembered."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from torch import nn

if TYPE_CHECKING:
    from stagewise.model.chain import Cell


class Form(Protocol):
    """The arguments that a model was captured with."""

    def bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        """What of a call the cells take, by name."""

    def takes(self, name: str) -> bool:
        """Whether some cell takes the argument `name`."""

    def matches(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Whether a call has arguments of the same form, batch size aside."""


class Captured:
    """A model as a chain of cells, made by `stagewise.capture`; called, it is the model.

    `chain` holds the cells, with the model's own parameters; `form` what a call must give.
    """

    def __init__(self, chain: tuple[Cell, ...], form: Form) -> None:
        self.chain, self.form = chain, form

    def __call__(self, *args: object, **kwargs: object) -> object:
        given = self.form.bind(args, kwargs)
        value: object = ()
        for cell in self.chain:
            names = cell.keywords(cell.index and 1)
            value = cell.module(value, **{name: given[name] for name in names if name in given})
        return value


# By model: so that Pipeline(model, plan) runs what plan(model, ...) has captured.
_CAPTURED: weakref.WeakKeyDictionary[nn.Module, Captured] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, captured: Captured) -> None:
    """Let `captured` stand for `model` as long as that lives."""
    _CAPTURED[model] = captured


def captured_of(model: object) -> Captured | None:
    """What was captured of `model`, if anything was."""
    if isinstance(model, Captured):
        return model
    return _CAPTURED.get(model) if isinstance(model, nn.Module) else None
