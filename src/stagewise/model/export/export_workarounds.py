"""What holds while torch.export traces a model: three of its habits, worked around.

Each is put back afterwards. torch.export does not look at the model's `forward` but by the names
used here.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import transformer
from torch.utils.checkpoint import CheckpointFunction

from stagewise.batch.objects import opened

OWN_BACKWARD = "has a backward of its own"


@contextmanager
def traceable(model: nn.Module, kwargs: Mapping[str, object]) -> Iterator[None]:
    """All of them."""
    with _masks_as_given(), _functions_refused(), _values_named(model, kwargs):
        yield


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Let nn.Transformer use its masks without looking whether one is causal.

    It looks in order to choose a faster kernel, which depends on the data; the mask does the same.
    """
    found = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = _is_causal
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = found


def _is_causal(mask: object, is_causal: bool | None = None, size: object = None) -> bool:
    return bool(is_causal)


@contextmanager
def _functions_refused() -> Iterator[None]:
    """Refuse autograd functions that are not torch's: a trace would drop their backward.

    It is their `forward` that refuses, since `apply` may have been looked up long ago.
    """
    kept = {
        kind: kind.__dict__["forward"]
        for kind in _subclasses(torch.autograd.Function)
        if "forward" in kind.__dict__
        and (kind.__module__.split(".")[0] != "torch" or kind is CheckpointFunction)
    }
    for kind in kept:
        kind.forward = _refusing(kind)
    try:
        yield
    finally:
        for kind, forward in kept.items():
            kind.forward = forward


def _refusing(kind: Any) -> Any:
    def forward(*_: object, **__: object) -> None:
        raise TypeError(f"the autograd function {kind.__qualname__} {OWN_BACKWARD}")

    return staticmethod(forward)


def _subclasses(kind: Any) -> set[Any]:
    found = set(kind.__subclasses__())
    return found.union(*map(_subclasses, found))


@contextmanager
def _values_named(model: nn.Module, kwargs: Mapping[str, object]) -> Iterator[None]:
    """Name the arguments that a `forward(**kwargs)` takes: torch.export mixes sizes up there.

    What it returns is taken apart, objects of plain classes too, which torch.export refuses.
    """
    run = model.forward
    before = model.__dict__.get("forward")

    def forward(*args: object, **given: object) -> object:
        return opened(run(*args, **given))

    signature = inspect.signature(run)
    if not kwargs.keys() <= signature.parameters.keys():
        signature = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs]
        )
    forward.__signature__ = signature  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before
