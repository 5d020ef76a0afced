"""Get the cells of any module: unless it is a sequence of cells, it is captured from an example.

If the caller names the cells, the model's own forward runs in each of them instead. Capturing code
is imported only where needed: it brings sympy, and 37 MiB that a rank would keep.
"""

import sys
from collections.abc import Mapping, Sequence

from torch import nn

from stagewise.batch.markers import Arguments, unmarked
from stagewise.batch.split import extent, first_microbatch
from stagewise.errors import ModelError
from stagewise.model.captured import captured_of
from stagewise.model.cell import Chain
from stagewise.model.chain import Model, chain_of, is_chain
from stagewise.slow_notice import notice_if_slow

_ALL = sys.maxsize  # samples


def chain_for(
    model: Model,
    inputs: object,
    keywords: Mapping[str, object],
    cells: Sequence[str] | None = None,
) -> Chain:
    """Return the model's cells, capturing it unless it is a chain or has a matching capture.

    `cells` names the modules to use as cells. ModelError if that fails, or without an example.
    """
    if cells is not None:
        return _named(model, inputs, keywords, cells)
    if not isinstance(model, nn.Module) or is_chain(model) or (inputs is None and not keywords):
        return chain_of(model)
    from stagewise.model.export.capture import capture

    args, kwargs = _example(inputs, keywords)
    captured = captured_of(model)
    if captured is None or not captured.form.matches(args, kwargs):
        with notice_if_slow(f"capturing {type(model).__name__}, and comparing its cells with it"):
            captured = capture(model, *args, **kwargs)
    return captured.chain


def _named(
    model: Model, inputs: object, keywords: Mapping[str, object], cells: Sequence[str]
) -> Chain:
    from stagewise.model.replay.capture_cells import AnyForm, capture_cells

    captured = captured_of(model)
    form = captured.form if captured is not None else None
    if isinstance(form, AnyForm) and form.cells == tuple(cells):
        return chain_of(model)
    if not isinstance(model, nn.Module) or (inputs is None and not keywords):
        raise ModelError(
            f"cells={list(cells)} needs "
            + ("an example of the batch" if isinstance(model, nn.Module) else "one nn.Module")
            + "; give stagewise.plan the model and an example, or leave cells out"
        )
    args, kwargs = _example(inputs, keywords)
    with notice_if_slow(f"cutting {type(model).__name__}, and comparing its cells with it"):
        return capture_cells(model, cells, *args, **kwargs).chain


def _example(
    inputs: object, keywords: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return a batch, all in one microbatch, as arguments of the model's forward.

    BatchError for an invalid batch, before anything is captured.
    """
    extent([("inputs", inputs), *keywords.items()])
    example = first_microbatch((inputs, dict(keywords)), _ALL)
    return _arguments(*unmarked(example))  # type: ignore[misc]


def entering(
    model: Model, inputs: object, keywords: Mapping[str, object]
) -> tuple[object, dict[str, object]]:
    """Return the chain's input, and its cells' keyword arguments (only these if captured)."""
    captured = captured_of(model)
    if captured is None:
        return inputs, dict(keywords)
    return None, captured.form.bind(*_arguments(inputs, keywords))


def _arguments(
    inputs: object, keywords: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the model's own arguments; in `plan`, several positional ones are one value."""
    if isinstance(inputs, Arguments):
        return inputs.args, {**inputs.kwargs, **keywords}
    return (() if inputs is None else (inputs,)), dict(keywords)
