"""Workarounds for three problems of torch.export, in effect while it traces a model.

Each patch is undone afterwards.
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
    """Apply all of them inside."""
    with _masks_as_given(), _functions_refused(), _values_named(model, kwargs):
        yield


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Make nn.Transformer use its masks without testing whether one is causal.

    The test, which depends on the data, only chooses a faster kernel; the mask has the same effect.
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
    """Refuse autograd functions other than torch's: a trace would drop their backward.

    Patches their `forward`, since references to `apply` may have been stored elsewhere.
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
    """Name the arguments of a `forward(**kwargs)`, for which torch.export would mix up sizes.

    Also takes apart objects of plain classes in its output, which torch.export refuses.
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
