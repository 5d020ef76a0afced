"""Calls that a forward makes for their effect: traced as operators, repeated by the cells.

`stagewise.add_loss` is one. Other modules register the function to call, under a name.
"""

from collections.abc import Callable

import torch
from torch.fx.node import has_side_effect

_LIBRARY = torch.library.Library("stagewise", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("effect(Tensor value, str what, str name) -> ()")  # type: ignore[no-untyped-call]
torch.library.register_fake("stagewise::effect", lambda value, what, name: None, lib=_LIBRARY)
EFFECT = torch.ops.stagewise.effect.default
has_side_effect(EFFECT)

_CALLS: dict[str, Callable[[torch.Tensor, str], None]] = {}


def traced_effect(what: str, call: Callable[[torch.Tensor, str], None]) -> None:
    """Register `call(value, name)`, which cells call where a trace has the effect `what`."""
    _CALLS[what] = call


def trace_effect(value: torch.Tensor, what: str, name: str) -> None:
    """Record the effect in the current trace."""
    torch.ops.stagewise.effect(value, what, name)


def make_effect(value: torch.Tensor, what: str, name: str) -> None:
    """Perform the effect, in a cell."""
    _CALLS[what](value, name)
