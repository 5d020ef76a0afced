"""Modules that remain calls of the real module in a captured graph.

torch.export traces into a module, and records what it did in that one mode. But a BatchNorm's
running statistics, dropout frozen by `.eval()`, an LSTM's kernel, hooks and parametrizations belong
to the module. So layers of torch.nn that own parameters or draw random numbers are traced as one
opaque operator, which later becomes a call of the module.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from stagewise.batch.layouts import is_sharded
from stagewise.errors import ModelError
from stagewise.model.forward.users_code import HOOKS

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass
class LeafCall:
    """One call of a leaf module in a trace, with the nesting of its arguments and its output.

    `arguments` are the leaves of (args, kwargs), with None for each tensor (`is_tensor`).
    """

    path: str
    arguments: list[object]
    is_tensor: list[bool]
    spec: pytree.TreeSpec
    run: Callable[..., object]
    out_paths: list[tuple[object, ...]] = field(default_factory=list)  # of returned tensors
    _returned: tuple[list[object], list[bool], pytree.TreeSpec] | None = None

    def filled(self, tensors: Sequence[object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return (args, kwargs) with `tensors` in their places."""
        rest = iter(tensors)
        leaves = [
            next(rest) if is_tensor else argument
            for argument, is_tensor in zip(self.arguments, self.is_tensor, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def fake(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run it on fake tensors; its results share no memory with them."""
        args, kwargs = self.filled(tensors)
        keyed, spec = pytree.tree_flatten_with_path(self.run(*args, **kwargs))
        is_tensor = [isinstance(leaf, torch.Tensor) for _, leaf in keyed]
        rest = [None if isinstance(leaf, torch.Tensor) else leaf for _, leaf in keyed]
        self._returned = (rest, is_tensor, spec)
        self.out_paths = [path for path, leaf in keyed if isinstance(leaf, torch.Tensor)]
        return [leaf.clone() for _, leaf in keyed if isinstance(leaf, torch.Tensor)]

    def returned(self, tensors: Sequence[torch.Tensor]) -> object:
        """Return the module's output, with `tensors` in their places."""
        assert self._returned is not None
        leaves, is_tensor, spec = self._returned
        rest = iter(tensors)
        filled = [
            next(rest) if tensor else leaf for leaf, tensor in zip(leaves, is_tensor, strict=True)
        ]
        return pytree.tree_unflatten(filled, spec)


_LIBRARY = torch.library.Library("stagewise", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("leaf(Tensor[] inputs, str path, int call) -> Tensor[]")  # type: ignore[no-untyped-call]
LEAF = torch.ops.stagewise.leaf.default
_running: dict[int, LeafCall] = {}  # of the current traces
_numbers = itertools.count()  # never reused, since torch caches an operator's results


def _fake(inputs: list[torch.Tensor], path: str, call: int) -> list[torch.Tensor]:
    return _running[call].fake(inputs)


torch.library.register_fake("stagewise::leaf", _fake, lib=_LIBRARY)


def is_leaf(module: nn.Module) -> bool:
    """Return whether `module` remains a call."""
    if isinstance(module, _BatchNorm) or is_quantised(module):
        return True
    cls = type(module).__mro__[1] if is_parametrized(module) else type(module)
    is_torch = cls.__module__.startswith("torch.nn.modules.")
    is_whole = cls is nn.MultiheadAttention or not any(
        name != "parametrizations" for name, _ in module.named_children()
    )
    keeps = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    in_place = bool(getattr(module, "inplace", False))
    return is_torch and is_whole and (keeps or isinstance(module, _DropoutNd)) and not in_place


def is_quantised(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer whose weight torch.export could not trace.

    Its weight is no plain Parameter: torchao puts a tensor subclass there, bitsandbytes a class of
    its own, in a subclass of nn.Linear.
    """
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return weight is not None and type(weight) is not nn.Parameter and not is_sharded(weight)


def leaves_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the leaf modules of `model`, by first path; modules inside a leaf do not count."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{leaf}.") for leaf in found)
        if path and not inside and is_leaf(module):
            found[path] = module
    return found


def check_hooks(model: nn.Module) -> None:
    """Raise ModelError for a backward hook on a non-leaf module, which no cell would run."""
    leaves = tuple(f"{path}." for path in leaves_of(model))
    for path, module in model.named_modules():
        hooks = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if hooks and not f"{path}.".startswith(leaves):
            name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
            raise ModelError(
                f"{path or 'the model itself'} ({type(module).__name__}) has a backward hook "
                f"({name}), which a trace would lose; register it on layers of torch.nn, whose "
                "hooks run"
            )


@contextmanager
def opaque(leaves: dict[str, nn.Module]) -> Iterator[dict[int, LeafCall]]:
    """Trace inside: calls of `leaves` become operators; yields the calls by number."""
    calls: dict[int, LeafCall] = {}
    kept = {path: {name: getattr(leaf, name) for name in HOOKS} for path, leaf in leaves.items()}
    forwards = {path: leaf.__dict__.get("forward") for path, leaf in leaves.items()}
    for path, leaf in leaves.items():
        for name in HOOKS:  # they run when the module is called
            setattr(leaf, name, type(kept[path][name])())
        leaf.__dict__["forward"] = _marked(path, leaf, calls)
    try:
        yield calls
    finally:
        for number in calls:
            del _running[number]
        for path, leaf in leaves.items():
            for name, hooks in kept[path].items():
                setattr(leaf, name, hooks)
            del leaf.__dict__["forward"]
            if forwards[path] is not None:
                leaf.__dict__["forward"] = forwards[path]


def _marked(path: str, leaf: nn.Module, calls: dict[int, LeafCall]) -> Callable[..., object]:
    run = leaf.forward
    faked = partial(_recurrent, leaf) if isinstance(leaf, nn.RNNBase) else run
    if is_quantised(leaf):
        faked = partial(_linear, leaf)

    def forward(*args: object, **kwargs: object) -> object:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        rest = [leaf for leaf, tensor in zip(leaves, is_tensor, strict=True) if not tensor]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if (
            not tensors
            or not all(type(leaf) in _CONSTANTS for leaf in rest)  # e.g. a symbolic size
            or any(map(is_functorch_wrapped_tensor, tensors))  # vmap does not support the operator
        ):
            return run(*args, **kwargs)  # traced into
        constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        number = next(_numbers)
        call = _running[number] = calls[number] = LeafCall(path, constants, is_tensor, spec, faked)
        return call.returned(torch.ops.stagewise.leaf(tensors, path, number))

    return forward


def _recurrent(module: nn.RNNBase, input: torch.Tensor, hx: object = None) -> object:
    """Return outputs of a recurrent layer's shapes; torch would unroll it, and fix the length."""
    del hx
    directions = 2 if module.bidirectional else 1
    size = module.proj_size or module.hidden_size
    samples = input.shape[:-1][: input.dim() - 2] if module.batch_first else input.shape[1:-1]
    states = [
        input.new_empty(module.num_layers * directions, *samples, width)
        for width in (size, module.hidden_size)
    ]
    output = input.new_empty(*input.shape[:-1], directions * size)
    return output, tuple(states) if isinstance(module, nn.LSTM) else states[0]


def _linear(module: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Return an output of a linear layer's shape, whatever its weight is."""
    assert isinstance(module, nn.Linear)
    return input.new_empty(*input.shape[:-1], module.out_features)
