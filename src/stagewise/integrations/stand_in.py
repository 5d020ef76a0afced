"""Called in place of a model: a trainer's own loss code finds what to run, and gets its outputs.

Problem: `compute_loss(model, inputs)` of a Trainer, or of a user's subclass, calls the model and
computes the loss of its outputs; in a pipeline the first happens on all ranks, the second on the
last. Idea: call it twice, with an object that looks like the model. The first call learns the
arguments and goes no further, the second gets the outputs that the last stage has computed.
"""

import inspect
from collections.abc import Callable
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
        names = list(inspect.signature(self._model.forward).parameters)
        return self._answer({**dict(zip(names, args, strict=False)), **kwargs})


class _Asked(Exception):
    def __init__(self, called: Called) -> None:
        super().__init__()
        self.called = called


def arguments_of(call: Callable[[Any], object], model: nn.Module) -> Called:
    """Return the arguments with which `call(model)` calls the model, without running that."""

    def stop(called: Called) -> object:
        raise _Asked(called)

    try:
        call(StandIn(model, stop))
    except _Asked as asked:
        return asked.called
    raise ModelError("compute_loss does not call the model it is given, so nothing can be trained")


def answering(model: nn.Module, output: object) -> StandIn:
    """Return a stand-in whose only call returns `output`."""
    left = [output]

    def answer(called: Called) -> object:
        if not left:
            raise ModelError(
                "compute_loss calls the model more than once, but a pipeline runs one forward in "
                "a step; make the calls one (join their batches), or use the plain Trainer"
            )
        return left.pop()

    return StandIn(model, answer)
