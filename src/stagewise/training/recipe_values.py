"""What a recipe may hold: its functions, by example, and a check and a description of values."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from stagewise.errors import RecipeError
from stagewise.training.state.optimizers import SeveralOptimizers
from stagewise.training.state.pretrained import Savable
from stagewise.training.state.schedules import is_scheduled


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


# The functions that every recipe has.
REQUIRED = {
    "model": (
        "def model():\n    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))"
    ),
    "data": (
        "def data(split):  # 'train' or 'validation'\n"
        "    return [(torch.randn(32, 8), torch.randn(32, 1)) for _ in range(100)]"
    ),
    "loss": ("def loss(output, target):\n    return torch.nn.functional.mse_loss(output, target)"),
    "optimizer": ("def optimizer(parameters):\n    return torch.optim.AdamW(parameters, lr=1e-3)"),
}

# Those that it may have, and how all are called.
OPTIONAL = {
    "callback": "record",
    "generate": "predict",
    "init": "module",
    "metrics": "output, target",
    "parallelize": "module, mesh, stage_index",
    "scheduler": "optimizer",
    "state": "module",
    "weight": "target",
}
_CALLS = OPTIONAL | {
    "model": "",
    "data": "split",
    "loss": "output, target",
    "optimizer": "parameters",
}

SCHEDULER = (
    "def scheduler(optimizer):\n"
    "    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)"
)

_NEARLY = 0.8  # the likeness, of at most 1, from which a name is taken for a typo

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
    "data_axes": (
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(name, str) for name in value)
            and all(type(dim) is int and dim >= 0 for dim in value.values())
        ),
        "a dict from axes of the mesh to the dimension of a batch's tensors that is divided along "
        "them, such as {'ep': 0, 'sp': 1}",
    ),
    "groups": (
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(pattern, str) for pattern in value)
            and all(isinstance(o, Mapping) and "params" not in o for o in value.values())
        ),
        "a dict from patterns of parameters' names to the options of a group of theirs (without "
        "'params', which the patterns tell), such as {'*.bias': {'weight_decay': 0.0}, 'head.*': "
        "{'lr': 1e-2}}",
    ),
    "scheduler_metric": (
        lambda value: isinstance(value, str),
        "the name of a metric or part of the loss on the validation data, such as 'accuracy'",
    ),
    "meta": (
        lambda value: isinstance(value, bool),
        "True, to build the model on the meta device, or False",
    ),
    "tokenizer": (
        lambda value: isinstance(value, Savable),
        "a tokenizer or processor of transformers, or another object with save_pretrained(folder)",
    ),
    "cells": (
        lambda value: (
            isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        ),
        "a list of module names or patterns, for example ['embed', 'layers.*', 'head']",
    ),
}


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `step` takes a function that computes the loss again."""
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    by_position = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return any(each.default is each.empty and each.kind in by_position for each in parameters)


def checked_optimizer(path: Path, made: object, *, has_schedule: bool) -> Optimizer:
    """Return what optimizer(parameters) made, several as one; raise RecipeError if unusable."""
    parts = list(made) if isinstance(made, list | tuple) and made else [made]
    for one in parts:
        if not isinstance(one, Optimizer):
            raise RecipeError(
                f"optimizer(parameters) in {path} returned a {type(made).__name__}; it must return "
                f"a torch.optim.Optimizer, or a list of them, for example:\n\n"
                f"{REQUIRED['optimizer']}"
            )
        if needs_closure(one):
            raise RecipeError(
                f"optimizer(parameters) in {path} returned a {type(one).__name__}, whose step() "
                "needs a closure that recomputes the loss; choose one that uses existing "
                "gradients, or train from Python, where pipe.step can be the closure"
            )
        if not has_schedule and is_scheduled(one):
            raise RecipeError(
                f"optimizer(parameters) in {path} also made a learning-rate schedule, which "
                "checkpoints would not include; return it from scheduler(optimizer) instead, for "
                f"example:\n\n{SCHEDULER}"
            )
    found = [one for one in parts if isinstance(one, Optimizer)]
    return found[0] if len(found) == 1 else SeveralOptimizers(found)


def check_spelling(path: Path, module: Mapping[str, object]) -> None:
    """Raise RecipeError for a name of the file that is nearly one which stagewise reads.

    Modules, classes, constants in capitals and names with an underscore first are the user's own.
    """
    defined = {
        name
        for name, value in module.items()
        if name.islower() and name[0] != "_" and not isinstance(value, ModuleType | type)
    }
    absent = {*VALUES, *OPTIONAL} - defined
    for name in defined - {*REQUIRED, *VALUES, *OPTIONAL}:
        near = difflib.get_close_matches(name, absent, n=1, cutoff=_NEARLY)
        if near and near[0] not in (f"{name}s", *_singulars(name), *name.split("_")):
            raise RecipeError(
                f"{path} defines {name}, which stagewise does not read: is it {near[0]}? If it is "
                f"your own, begin its name with an underscore: _{name}"
            )


def _singulars(name: str) -> tuple[str, str]:
    return name.removesuffix("s"), name.removesuffix("es")


def checked_function(path: Path, name: str, value: Any) -> Any:
    """Return `value`; raise RecipeError unless it can be called as stagewise calls it."""
    if not callable(value):
        raise RecipeError(f"{name} in {path} is a {type(value).__name__}; it must be a function")
    call = _CALLS[name]
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of functions that are not Python's it may be unknown
        return value
    try:
        signature.bind(*filter(None, call.split(", ")))
    except TypeError as error:
        raise RecipeError(
            f"{name} in {path} takes {signature}, but is called as {name}({call}) ({error}); "
            "give it these parameters"
        ) from None
    return value


def checked_value(path: Path, name: str, value: Any) -> Any:
    """Return `value`; raise RecipeError that says what it must be if it is invalid."""
    is_right, needed = VALUES[name]
    if not is_right(value):
        raise RecipeError(f"{name} in {path} is {value!r}; it must be {needed}")
    return value
