"""The values that a recipe may set besides functions: a check and a description of each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stagewise.errors import RecipeError


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_scaler_options(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    try:
        torch.amp.GradScaler("cpu", **value)
    except (AssertionError, TypeError, ValueError):
        return False
    return True


VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "clip_grad_norm": (
        _is_positive,
        "a positive number, the maximum norm of the gradients",
    ),
    "clip_grad_value": (
        _is_positive,
        "a positive number, the maximum absolute value of a gradient's elements",
    ),
    "accumulate": (
        lambda value: type(value) is int and value > 0,
        "a positive integer: how many batches of data('train') make up a step",
    ),
    "autocast": (
        lambda value: value in (torch.bfloat16, torch.float16),
        "torch.bfloat16 or torch.float16",
    ),
    "grad_scaler": (
        _is_scaler_options,
        "a dict of options of torch.amp.GradScaler, such as {'init_scale': 1024.0}, or {}",
    ),
    "accumulate_in_float32": (
        lambda value: isinstance(value, bool),
        "True, to sum gradients of bfloat16 and float16 parameters in float32, or False",
    ),
    "find_nonfinite": (
        lambda value: isinstance(value, bool),
        "True, to find the cell that makes the first NaN or inf, or False",
    ),
    "compare_batches": (
        lambda value: isinstance(value, bool),
        "True, to compare the batches of all ranks in every step, or False",
    ),
    "batch_dim": (
        lambda value: type(value) is int,
        "an integer: the dimension of a batch's tensors along which the samples are",
    ),
    "loss_reduction": (
        lambda value: value in ("mean", "sum"),
        "'mean' or 'sum': how loss(output, target) reduces over the samples",
    ),
    "meta": (
        lambda value: isinstance(value, bool),
        "True, to build the model on the meta device, or False",
    ),
    "cells": (
        lambda value: (
            isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        ),
        "a list of module names or patterns, for example ['embed', 'layers.*', 'head']",
    ),
}


def checked_value(path: Path, name: str, value: Any) -> Any:
    """Return `value`; raise RecipeError that says what it must be if it is invalid."""
    is_right, needed = VALUES[name]
    if not is_right(value):
        raise RecipeError(f"{name} in {path} is {value!r}; it must be {needed}")
    return value
