"""Optimizers that a recipe may return beyond a plain one: several together, and those with modes;
and the groups of parameters that it is given.

Muon updates matrices only, so another updates the rest; a rank may hold parameters for one of them
alone, and torch refuses an empty list. Schedule-free optimizers keep one set of weights to train
with and another to evaluate with, and are told which is wanted.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from stagewise.errors import RecipeError

Groups = Mapping[str, Mapping[str, Any]]  # pattern of names -> the group's options


@runtime_checkable
class HasModes(Protocol):
    """An optimizer whose parameters differ in training and in evaluation."""

    def train(self) -> object:
        """Put in the parameters to train with."""

    def eval(self) -> object:
        """Put in the parameters to evaluate and to save."""


def for_training(optimizer: object) -> None:
    """Let an optimizer with modes put in the parameters to train with."""
    if isinstance(optimizer, HasModes):
        optimizer.train()


def for_evaluation(optimizer: object) -> None:
    """Let an optimizer with modes put in the parameters to evaluate and to save."""
    if isinstance(optimizer, HasModes):
        optimizer.eval()


class SeveralOptimizers(Optimizer):
    """Several optimizers as one, with the groups of all; their states share one dict."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.parts = list(optimizers)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        for part in self.parts:
            self.state.update(part.state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each of them."""
        for part in self.parts:
            part.step()

    def train(self) -> None:
        """Put those with modes into training."""
        for part in self.parts:
            for_training(part)

    def eval(self) -> None:
        """Put those with modes into evaluation."""
        for part in self.parts:
            for_evaluation(part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of all groups, and give each its own."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


@contextmanager
def empty_lists_allowed() -> Iterator[None]:
    """Let optimizers be made of no parameters: a rank may hold none of those that one is for."""
    made = Optimizer.__init__

    def init(self: Optimizer, params: Any, defaults: dict[str, Any]) -> None:
        if not isinstance(params, torch.Tensor):
            params = list(params) or [{"params": []}]
        made(self, params, defaults)

    Optimizer.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.__init__ = made  # type: ignore[method-assign]


def grouped(
    parameters: Sequence[nn.Parameter], names: Sequence[str], groups: Groups
) -> list[dict[str, Any]]:
    """Return a group for each pattern, of what it is the first to match, and last of the rest.

    Every rank has all of them, in the same order; schedules may treat each differently.
    """
    made = [{"params": list[nn.Parameter](), **options} for options in (*groups.values(), {})]
    for parameter, name in zip_longest(parameters, names, fillvalue=""):
        matching = (n for n, pattern in enumerate(groups) if fnmatchcase(str(name), pattern))
        made[next(matching, -1)]["params"].append(parameter)
    return made


def check_groups(path: Path, groups: Groups, names: Collection[str]) -> None:
    """Raise RecipeError for a pattern that matches none of the model's parameters first."""
    left = set(names)
    for pattern in groups:
        found = {name for name in left if fnmatchcase(name, pattern)}
        if not found:
            taken = any(fnmatchcase(name, pattern) for name in names)
            raise RecipeError(
                f"groups in {path}: {pattern!r} "
                + ("only matches what patterns before it do" if taken else "matches no parameter")
                + f"; the model's are called {', '.join([*names][:6])}{' ...' * (len(names) > 6)}"
            )
        left -= found
