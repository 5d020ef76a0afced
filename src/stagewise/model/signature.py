"""Which arguments a cell's `forward` has by name."""

import inspect

from torch import nn

from stagewise.model.piece import Piece

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameter_names(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of `forward`'s (positional, keyword-only) parameters; `*args`, `**kwargs` have none.

    A positional-only parameter counts under a name that no keyword can have.
    """
    if isinstance(module, Piece):
        carried = () if module.is_first else ("value (positional only)",)
        return (*carried, *module.input_names), ()
    module = getattr(module, "_orig_mod", module)  # of torch.compile, whose forward hides it
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature
        return (), ()
    positional = tuple(
        p.name if p.kind in _BY_NAME else f"{p.name} (positional only)"
        for p in parameters
        if p.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    )
    only = tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
    return positional, only
