"""Copies of modules and tensors that have shapes but no memory; comparison of modules.

Fake tensors claim to be on the CPU, so PyTorch chooses the same kernels (especially for attention)
as for real tensors; on the meta device it would use decompositions that save other tensors for the
backward pass.
"""

import copy
from collections.abc import Hashable, Iterator
from functools import partial
from types import FunctionType, MethodType

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stagewise.batch.layouts import is_sharded
from stagewise.engine.gradients.shards import like, local_of

_OWN = ("_parameters", "_buffers", "_modules")
_DEPTH = 8  # of functions that refer to functions


def fake_mode() -> FakeTensorMode:
    """Return a mode in which nothing is allocated; it also accepts real tensors, as of a loss."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor of the same form; call inside a `fake_mode`."""
    if is_sharded(tensor):
        part = fake_like(local_of(tensor).detach())
        return like(tensor, part).requires_grad_(tensor.requires_grad)
    if tensor.layout is not torch.strided:
        return torch.empty_like(tensor, device="cpu")
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return fake.requires_grad_(tensor.requires_grad)


def fake_module(module: nn.Module) -> nn.Module:
    """Return a copy of `module` with fake tensors only; call inside a `fake_mode`.

    The module itself, and any state it keeps between calls, is not changed.
    """
    fakes: dict[int, object] = {}
    for tensor in _tensors(module):
        fake = fake_like(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(module, fakes)


def likeness(module: nn.Module) -> Hashable:
    """Return a key that is equal for modules that do the same work: class, shapes, mode, settings.

    Functions are equal if their code is, and what they refer to; what cannot be compared is equal
    only if it is the same object.
    """
    order: dict[int, int] = {}  # modules with different ties are different
    return tuple(
        (
            path,
            type(part),
            *(
                (kind, name, order.setdefault(id(value), len(order)), plain(value))
                for kind, tensors in (("p", part._parameters), ("b", part._buffers))
                for name, value in tensors.items()
            ),
            *((name, plain(v)) for name, v in vars(part).items() if name not in _OWN),
        )
        for path, part in module.named_modules(remove_duplicate=False)
    )


def plain(value: object, depth: int = 0) -> Hashable:
    """Return a key that is equal for equal values, or for the same object."""
    if isinstance(value, torch.Tensor):
        stride = value.stride() if value.layout is torch.strided else value.layout
        form = (tuple(value.shape), stride, value.dtype, value.requires_grad)
        return (type(value), *form)
    if isinstance(value, tuple | list | set | frozenset):
        return (type(value), *(plain(item, depth) for item in value))
    if isinstance(value, dict):
        return (
            type(value),
            *((plain(key, depth), plain(item, depth)) for key, item in value.items()),
        )
    simple = bool | int | float | complex | str | bytes | torch.dtype | torch.device
    if value is None or isinstance(value, simple):
        return (type(value), value)
    if depth < _DEPTH and (inside := _inside(value)) is not None:
        return (type(value), *(plain(item, depth + 1) for item in inside))
    return ("the same object", id(value))


def _inside(value: object) -> tuple[object, ...] | None:
    """Return what a function or a placement of a DTensor is made of, such as code and closure."""
    if isinstance(value, FunctionType):
        try:
            held = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:  # not assigned yet
            return None
        code = id(value.__code__), id(value.__globals__)
        return (*code, held, value.__defaults__, value.__kwdefaults__)
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return id(value.__func__), id(value.__self__)
    if type(value).__module__ == "torch.distributed.tensor.placement_types":
        return (repr(value),)
    return None


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters, buffers, and tensors that are plain attributes."""
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(value, torch.Tensor):
                yield value
