"""Taking any module: what is no chain of cells is captured from the example that came with it."""

import sys
from collections.abc import Mapping

from torch import nn
from torch.utils import _pytree as pytree

from stagewise.engine.markers import Arguments, Replicated, is_mark
from stagewise.engine.microbatch import first_microbatch
from stagewise.model.capture.capture import capture
from stagewise.model.captured import captured_of
from stagewise.model.chain import Chain, Model, chain_of, is_chain

_ALL = sys.maxsize  # samples


def chain_for(model: Model, inputs: object, keywords: Mapping[str, object]) -> Chain:
    """The model's cells; a module that is no chain is captured, unless it was with such arguments.

    Raises ModelError where that cannot be done, or where there is no example.
    """
    if not isinstance(model, nn.Module) or is_chain(model) or (inputs is None and not keywords):
        return chain_of(model)
    example = first_microbatch((inputs, dict(keywords)), _ALL)
    args, kwargs = _arguments(
        *pytree.tree_map(
            lambda leaf: leaf.value if isinstance(leaf, Replicated) else leaf,
            example,
            is_leaf=is_mark,
        )
    )
    captured = captured_of(model)
    if captured is None or not captured.form.matches(args, kwargs):
        captured = capture(model, *args, **kwargs)
    return captured.chain


def entering(
    model: Model, inputs: object, keywords: Mapping[str, object]
) -> tuple[object, dict[str, object]]:
    """What enters the chain, and what its cells take by name: the latter alone if captured."""
    captured = captured_of(model)
    if captured is None:
        return inputs, dict(keywords)
    return None, captured.form.bind(*_arguments(inputs, keywords))


def _arguments(
    inputs: object, keywords: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The model's own arguments: several positional ones are one value in `plan`."""
    if isinstance(inputs, Arguments):
        return inputs.args, {**inputs.kwargs, **keywords}
    return (() if inputs is None else (inputs,)), dict(keywords)
