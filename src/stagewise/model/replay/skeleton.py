"""The model without values, which every cell can run.

A copy of the model's modules with parameters and buffers on the meta device, and with blocks that
call back; one copy serves all cells of a process.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from stagewise.errors import CellError, ModelError
from stagewise.model.forward.users_code import HOOKS

Block = Callable[[int, tuple[object, ...], dict[str, object]], object]


class Skeleton:
    """`model` without values; calls of the modules at `paths` go to the running `block`.

    `states` maps ids of the parameters and buffers here to their names. Non-persistent buffers are
    `constant`, the same everywhere; all others belong to the cells that use them.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        memo: dict[int, object] = {}
        self.states: dict[int, str] = {}
        given: list[torch.Tensor] = []
        for name, state in (*model.named_parameters(), *model.named_buffers()):
            given.append(state)
            empty = torch.empty(state.shape, dtype=state.dtype, device="meta")  # of any subclass
            memo[id(state)] = (
                nn.Parameter(empty, requires_grad=state.requires_grad)
                if isinstance(state, nn.Parameter)
                else empty
            )
            self.states[id(memo[id(state)])] = name
        self.constant = {
            f"{path}.{name}" if path else name
            for path, module in model.named_modules(remove_duplicate=False)
            for name in module._non_persistent_buffers_set
        }
        try:
            self.model: nn.Module = copy.deepcopy(model, memo)
        except Exception as error:
            raise ModelError(
                f"cells= needs a copy of {type(model).__name__}'s modules, but copy.deepcopy "
                f"failed: {type(error).__name__}: {error}; do not keep uncopyable objects in the "
                "model's attributes"
            ) from error
        # Kept, since their ids are used. The rest of `memo` would keep the model alive.
        self._kept = [memo[id(state)] for state in given]
        self.block: Block | None = None
        for index, path in enumerate(paths):
            module = self.model.get_submodule(path)
            for hooks in HOOKS:
                setattr(module, hooks, OrderedDict())
            module.forward = _StandIn(self, index, path)
        modules = list(self.model.modules())
        self._registered = [
            (module, dict(module._parameters), dict(module._buffers))
            for module in modules
            if module._parameters or module._buffers
        ]
        own = model.training
        self._modes = {own: [m.training for m in modules], not own: [not own] * len(modules)}
        self._training = own

    def train(self, mode: bool) -> None:
        """Put the modules in training or eval mode; frozen ones keep theirs."""
        if mode is not self._training:
            for module, training in zip(self.model.modules(), self._modes[mode], strict=True):
                module.training = training
            self._training = mode

    def put_back(self) -> None:
        """Undo forward's assignments to parameters and buffers."""
        for module, parameters, buffers in self._registered:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    def __deepcopy__(self, memo: dict[int, object]) -> "Skeleton":
        return self  # it holds no values


class _StandIn:
    """A block's `forward` in the skeleton."""

    def __init__(self, skeleton: Skeleton, index: int, path: str) -> None:
        self._skeleton, self._index, self._path = skeleton, index, path

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self._skeleton.block is None:
            raise CellError(
                f"block {self._path} was called after the model's forward, as gradient "
                "checkpointing does; disable that, and give plan() recompute='always'"
            )
        return self._skeleton.block(self._index, args, kwargs)
