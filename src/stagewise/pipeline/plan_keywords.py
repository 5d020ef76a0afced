"""An example's keyword arguments: those of the model, not misspelt ones of `plan`."""

import inspect
from collections.abc import Collection, Sequence

from torch import nn

from stagewise.habits import meant_argument, refuse_argument
from stagewise.model.captured import Captured
from stagewise.model.chain import Model, is_chain


def check_keywords(model: Model, keywords: Collection[str], own: Collection[str]) -> None:
    """Raise TypeError for a keyword that no forward takes, with the one of `own` that is meant."""
    if not keywords or isinstance(model, Captured):
        return
    if isinstance(model, nn.Module) and not is_chain(model):
        forwards = [model.forward]
    else:
        forwards = [module.forward for module in _modules(model)]
    taken = [inspect.signature(forward).parameters for forward in forwards]
    named = {name for parameters in taken for name in parameters}
    takes_any = any(p.kind is p.VAR_KEYWORD for parameters in taken for p in parameters.values())
    for name in keywords:
        if name not in named and (not takes_any or meant_argument(name, own) is not None):
            refuse_argument("plan", name, own)


def _modules(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    parts = [model] if isinstance(model, nn.Module) else [*model]
    return [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
