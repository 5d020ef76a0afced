"""An example's keyword arguments: those of the model, not misspelt ones of `plan`."""

import inspect
from collections.abc import Callable, Collection, Sequence

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
        if _takes_any(model.forward):  # such as PEFT's wrapper, which passes them on
            inside = (m for m in model.modules() if not type(m).__module__.startswith("torch."))
            forwards += [module.forward for module in inside]
    else:
        forwards = [module.forward for module in _modules(model)]
    taken = [inspect.signature(forward).parameters for forward in forwards]
    named = {name for parameters in taken for name in parameters}
    takes_any = any(map(_takes_any, forwards))
    for name in keywords:
        if name not in named and (not takes_any or meant_argument(name, own) is not None):
            refuse_argument("plan", name, own)


def _takes_any(forward: Callable[..., object]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _modules(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    parts = [model] if isinstance(model, nn.Module) else [*model]
    return [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
