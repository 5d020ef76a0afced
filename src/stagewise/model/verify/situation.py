"""Call the model in a given state of its modules and of torch, leaving no trace."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from stagewise.model.verify.rare_draws import save_others, seed_others


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The state of modules and torch in a call of the model."""

    training: bool
    gradients: bool = True
    autocast: bool = False

    def __str__(self) -> str:
        return (
            f"{'training' if self.training else 'eval'} mode"
            + ("" if self.gradients else " without gradients")
            + (" under autocast" if self.autocast else "")
        )


TRAINING, EVAL = Situation(training=True), Situation(training=False)
PREDICTING = Situation(training=False, gradients=False)
UNDER_AUTOCAST = Situation(training=True, autocast=True)
SITUATIONS = (TRAINING, EVAL, PREDICTING)  # those in which any pipeline may run cells


@contextmanager
def kept(model: nn.Module, training: bool) -> Iterator[None]:
    """Run with `model` in a mode and without gradients; then restore what it had.

    That is modes, attributes, buffers, gradients (a backward inside a function's own backward adds
    to `.grad`) and random states.
    """
    modules = list(model.modules())
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [module.training for module in modules]
    attributes = [_attributes(module) for module in modules]
    buffers = [
        (m, n, b, b.clone()) for m in modules for n, b in m._buffers.items() if b is not None
    ]
    if model.training is not training:
        model.train(training)
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with seeded():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode, before in zip(modules, modes, attributes, strict=True):
            vars(module).clear()
            vars(module).update((name, value) for name, value, _ in before)
            for _, value, items in before:
                if isinstance(value, dict) and _is_plain(value):  # e.g. of hooks added in forward
                    value.clear()
                    value.update(items)
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer


def _attributes(module: nn.Module) -> list[tuple[str, object, dict[object, object]]]:
    """Return names and values, and copies of plain dicts (such as those of hooks)."""
    return [
        (name, value, dict(value) if isinstance(value, dict) and _is_plain(value) else {})
        for name, value in vars(module).items()
    ]


def _is_plain(value: dict[object, object]) -> bool:
    """Return whether a dict has no special behaviour, unlike a frozen one."""
    return type(value) in (dict, OrderedDict)


@contextmanager
def seeded(others: int = 0) -> Iterator[None]:
    """Seed torch's random numbers, with `others` Python's and NumPy's; restore all afterwards."""
    put_back = save_others()
    try:
        seed_others(others)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        put_back()


@contextmanager
def surroundings(model: nn.Module, situation: Situation) -> Iterator[None]:
    """Enable or disable gradients and autocast inside as in `situation`.

    Also disables torch's fast path for attention, which leaves other numbers in padded places.
    """
    kinds = [parameter.device.type for parameter in model.parameters()]
    device = kinds[0] if kinds and kinds[0] != "meta" else "cpu"
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(situation.gradients),
            torch.autocast(device, torch.bfloat16, enabled=situation.autocast),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
