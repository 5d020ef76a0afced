"""The names under which a checkpoint may hold a model's tensors."""

from collections.abc import Mapping

import torch
from torch import nn

Aliases = Mapping[str, tuple[str, ...]]


def aliases_of(model: nn.Module) -> Aliases:
    """Return every name in the model's state_dict with all names of its tensor, in order.

    An entry that is not a tensor (`get_extra_state`) only has its own name.
    """
    same: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        same.setdefault(id(value), []).append(name)
    return {
        name: tuple(same[id(value)]) if isinstance(value, torch.Tensor) else (name,)
        for name, value in state.items()
    }
