"""A model's modules without its values, so that its own Python code can run later.

Problem: a Pipeline frees the stages of other ranks, but `generate` is a method of the whole model,
whose forward calls every layer. Idea: keep copies of the modules with parameters on the meta
device, and put this rank's own in while they are needed.
"""

import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Generative(Protocol):
    """What transformers' models with a language modelling head are, among other things."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts."""


def skeleton_of(model: object) -> nn.Module | None:
    """Return the modules of a model that generates; None of another, whose use they have not."""
    if not isinstance(model, nn.Module) or not isinstance(model, Generative):
        return None
    made: dict[int, nn.Module] = {}
    bare = _bare(model, made, {})
    for module in made.values():
        for name, value in vars(module).items():
            if isinstance(value, types.MethodType) and id(value.__self__) in made:
                module.__dict__[name] = types.MethodType(value.__func__, made[id(value.__self__)])
            elif isinstance(value, nn.Module) and id(value) in made:
                module.__dict__[name] = made[id(value)]
    return bare.eval()


def _bare(
    module: nn.Module, made: dict[int, nn.Module], tensors: dict[int, nn.Parameter]
) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    made[id(module)] = copy = module.__new__(type(module))
    copy.__dict__ = {
        name: value.copy() if isinstance(value, dict | OrderedDict) and name[0] == "_" else value
        for name, value in vars(module).items()
    }
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in tensors:
            like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            tensors[id(parameter)] = nn.Parameter(like, False)
        copy._parameters[name] = None if parameter is None else tensors[id(parameter)]
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _bare(child, made, tensors)
    return copy


@contextmanager
def filled(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put the tensors of these names into a skeleton, and take them out again."""
    taken: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor | None]] = []
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name in tensors:
                full = f"{path}.{name}" if path else name
                if full in values:
                    taken.append((tensors, name, tensors[name]))
                    tensors[name] = values[full]
    try:
        yield
    finally:
        for tensors, name, value in taken:
            tensors[name] = value
