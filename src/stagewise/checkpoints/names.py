"""Under which names a checkpoint may hold a model's tensors."""

from collections.abc import Mapping

import torch

from stagewise.model.cell import Chain
from stagewise.model.chain import module_tree

Aliases = Mapping[str, tuple[str, ...]]


def aliases_of(chain: Chain) -> Aliases:
    """Every name in the plain model's state_dict, with all names of the same tensor in order.

    Those of what is no tensor (`get_extra_state`) stand for themselves.
    """
    same: dict[int, list[str]] = {}
    state = module_tree(chain).state_dict(keep_vars=True)
    for name, value in state.items():
        same.setdefault(id(value), []).append(name)
    return {
        name: tuple(same[id(value)]) if isinstance(value, torch.Tensor) else (name,)
        for name, value in state.items()
    }
