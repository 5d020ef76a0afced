"""Copies of cells, and contexts in which they run and leave no trace, for the looks.

A twin shares a cell's parameters; all else is its own. Its dropout and BatchNorm are in eval mode:
how samples affect each other there is known, and made exact or warned of elsewhere.
"""

import copy
import functools
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from stagewise.engine.stage.autograd import without_weight_cache
from stagewise.engine.stage.buffers import overwrite
from stagewise.engine.stage.draws import Draws
from stagewise.engine.stage.gradient import gradients_aside
from stagewise.engine.stage.randomness import generators_kept, generators_moved
from stagewise.model.added_losses import COLLECTING, LossCollector
from stagewise.model.cell import Cell, Piece
from stagewise.model.forward.contents import PLAIN
from stagewise.model.forward.users_code import is_stock

# torch's layers that treat every sample by itself, whatever they are given, or fail.
_BY_SAMPLE = {
    *(nn.Identity, nn.Linear, nn.Embedding, nn.Dropout, nn.Sequential, nn.LayerNorm, nn.RMSNorm),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid),
}
# What deepcopy refuses, but may be used by a copy, too. (An iterator or a file would move on.)
_STATELESS = type(threading.Lock()), type(threading.RLock()), ModuleType
_MAKE_COPIES = "__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__slots__"


def twin(cell: Cell, *, in_eval: bool) -> Cell:
    """Return a copy of `cell`, wholly in eval mode or in the cell's own.

    Forward hooks that are functions are left out: they write to what is not copied.
    """
    module = getattr(cell.module, "_orig_mod", cell.module)
    try:
        copied = _copied(module, [m for m in module.modules() if _is_plain(type(m))])  # type: ignore
    except Exception:  # a lock, a class that forbids it
        copied = _copied(module, [*module.modules()], shared=_STATELESS)
    for inner in copied.modules():
        if in_eval or isinstance(inner, _BatchNorm | _DropoutNd):
            inner.training = False
        for hooks in (inner._forward_hooks, inner._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, FunctionType)]:
                del hooks[key]
    return replace(cell, module=copied)


def _copied(
    module: nn.Module, plain: Sequence[nn.Module], *, shared: tuple[type, ...] = ()
) -> nn.Module:
    """Copy `module`, its `plain` layers by attributes: as deepcopy would, in a fifth of the time.

    Attributes of the types `shared` stay the original's.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    memo |= {id(layer): object.__new__(type(layer)) for layer in plain}
    for layer in plain:
        own = memo[id(layer)].__dict__
        for name, value in vars(layer).items():
            if isinstance(layer, _BatchNorm) and name == "forward":  # ours, for a call
                continue
            if type(value) in (dict, OrderedDict, set) and not value:
                own[name] = memo.setdefault(id(value), type(value)())
            elif name != "_compiled_call_impl":
                stays = isinstance(value, (*PLAIN, *shared))
                own[name] = value if stays else copy.deepcopy(value, memo)
    return copy.deepcopy(module, memo)


@functools.cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Return whether copying the attributes of its objects copies them."""
    own = [vars(cls) for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]]
    return not any(name in names for names in own for name in _MAKE_COPIES)


def treats_samples_alone(module: nn.Module) -> bool:
    """Return whether the types of its layers tell that it treats every sample by itself."""
    return all(type(layer) in _BY_SAMPLE for layer in module.modules()) and is_stock(module)


def has_batchnorm(module: nn.Module) -> bool:
    """Return whether it may run a BatchNorm, as any piece of a captured model may."""
    return isinstance(module, Piece) or any(isinstance(m, _BatchNorm) for m in module.modules())


def sideways_layer(module: nn.Module, batch_dim: int) -> str | None:
    """Describe a layer in `module` that may take samples along another dimension than `batch_dim`.

    A recurrent layer takes input without a batch dimension as one sequence, whatever `batch_first`.
    """
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
            expected = 0 if layer.batch_first else 1
            if isinstance(layer, nn.RNNBase) or expected != batch_dim:
                return f"{type(layer).__name__} with batch_first={layer.batch_first}"
    return None


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Run `module` inside in eval mode; its modes and buffers are put back."""
    modes = [(inner, inner.training) for inner in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.eval()
    try:
        yield
    finally:
        for inner, mode in modes:
            inner.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                overwrite(buffer, value)


@contextmanager
def without_trace(
    devices: Collection[torch.device], parameters: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Run something inside that leaves no warning, loss, graph or drawn random number behind.

    Nor gradients that code adds to `parameters` itself.
    """
    outer, COLLECTING.active = COLLECTING.active, LossCollector()
    try:
        with (
            warnings.catch_warnings(),
            generators_kept(devices),
            Draws([]).kept(undo=True),
            gradients_aside(parameters),
            torch.no_grad(),
            ExitStack() as stack,
        ):
            for device in devices:
                stack.enter_context(without_weight_cache(device.type))
            warnings.simplefilter("ignore")
            yield
    finally:
        COLLECTING.active = outer


@contextmanager
def drawn_from(devices: Collection[torch.device]) -> Iterator[list[object]]:
    """Yield a list that at the end holds the generators used inside: torch's, Python's, NumPy's."""
    found: list[object] = []
    with generators_moved(devices) as moved, Draws([]).kept(guard=True) as late:
        yield found
    found += [*moved, *late]


class Normalising(TorchFunctionMode):
    """Notes whether a BatchNorm inside normalises by a batch's own statistics.

    Other code that does so mixes samples, of which nothing else warns. (A dispatch mode would
    import torch's compiler: 70 MiB in every process.)
    """

    found = False

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        name, given = getattr(func, "__name__", ""), (*args, *(kwargs or {}).values())
        if "batch_norm" in name and isinstance(given[0], torch.Tensor) and len(given[0]) > 1:
            by_batch = "update" in name or any(value is True for value in given)
            self.found |= by_batch and _in_batchnorm(sys._getframe())
        return func(*args, **(kwargs or {}))


def _in_batchnorm(frame: FrameType | None) -> bool:
    """Return whether a BatchNorm's own code is running."""
    while frame is not None and not isinstance(frame.f_locals.get("self"), _BatchNorm):
        frame = frame.f_back
    return frame is not None
