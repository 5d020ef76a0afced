"""Called in place of a model: a trainer's own loss code finds what to run, and gets its outputs.

Problem: `compute_loss(model, inputs)` of a Trainer, or `training_step(batch)` of a LightningModule,
calls the model and computes the loss of its outputs; in a pipeline the first happens on all ranks,
the second on the last. Idea: call it twice. The first call learns the model's arguments and goes no
further, the second gets the outputs that the last stage has computed. It is given an object that
looks like the model, or finds the model's forward replaced.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from stagewise.errors import ModelError

Called = dict[str, Any]  # the arguments of the model's forward, by name


class StandIn:
    """Looks like `model`, but calling it calls `answer` with the arguments by name."""

    def __init__(self, model: nn.Module, answer: Callable[[Called], object]) -> None:
        self._model, self._answer = model, answer

    @property
    def __class__(self) -> type:
        return type(self._model)

    @__class__.setter
    def __class__(self, value: type) -> None:  # only because object declares one
        raise TypeError("the class of a model cannot be changed")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._answer(_named(self._model.forward, args, kwargs))


def _named(forward: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> Called:
    names = list(inspect.signature(forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


@contextmanager
def forward_answered(model: nn.Module, answer: Callable[[Called], object]) -> Iterator[None]:
    """Let calls of `model`, wherever they are made, call `answer` with the arguments by name."""
    forward, own = model.forward, vars(model).get("forward")

    @functools.wraps(forward)
    def answered(*args: object, **kwargs: object) -> object:
        return answer(_named(forward, args, kwargs))

    vars(model)["forward"] = answered
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


class _Asked(Exception):
    def __init__(self, called: Called) -> None:
        super().__init__()
        self.called = called


def arguments_of(call: Callable[[Any], object], model: nn.Module) -> Called:
    """Return the arguments with which `call(model)` calls the model, without running that."""

    return _asked(lambda stop: call(StandIn(model, stop)), "compute_loss")


def arguments_in(call: Callable[[], object], model: nn.Module, what: str) -> Called:
    """Return the arguments with which `call()`, named `what`, calls the model."""

    def run(stop: Callable[[Called], object]) -> object:
        with forward_answered(model, stop):
            return call()

    return _asked(run, what)


def _asked(run: Callable[[Callable[[Called], object]], object], what: str) -> Called:
    def stop(called: Called) -> object:
        raise _Asked(called)

    try:
        run(stop)
    except _Asked as asked:
        return asked.called
    raise ModelError(f"{what} does not call the model that is cut, so nothing can be trained")


def once(output: object, what: str) -> Callable[[Called], object]:
    """Return what answers the only call of a model in `what` with `output`."""
    left = [output]

    def answer(called: Called) -> object:
        if not left:
            raise ModelError(
                f"{what} calls the model more than once, but a pipeline runs one forward in "
                "a step; make the calls one (join their batches), or use the plain Trainer"
            )
        return left.pop()

    return answer
