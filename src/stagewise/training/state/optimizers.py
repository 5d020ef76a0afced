"""Optimizers that a recipe may return beyond a plain one: several together, and those with modes.

Muon updates matrices only, so another updates the rest; a rank may hold parameters for one of them
alone, and torch refuses an empty list. Schedule-free optimizers keep one set of weights to train
with and another to evaluate with, and are told which is wanted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch.optim import Optimizer


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
