"""Replace random numbers by a constant, so that cells that draw them can be checked.

Random draws depend on how the batch is split, which excuses differences; any other error in the
same cell would hide behind that excuse. With every draw replaced by the same constant, the result
must not depend on how the batch is split.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stagewise.engine.stage.randomness import default_generator

_CONSTANT = 0.5
_MOST = 1000  # draws; rejection sampling would never end


class TooManyDraws(Exception):
    """The code may never end with constant draws."""


class ConstantDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What torch draws inside is 0.5, or 0 where it draws whole numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator, self._left = default_generator(device), _MOST

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = self._generator.get_state()
        result = func(*args, **(kwargs or {}))
        if torch.equal(before, self._generator.get_state()):
            return result  # as attention without dropout
        self._left -= 1
        if self._left < 0:
            raise TooManyDraws
        if func is torch.ops.aten.native_dropout.default:  # of input and mask: CUDA's dropout
            value = args[0]
            assert isinstance(value, torch.Tensor)
            return value.clone(), torch.ones_like(value, dtype=torch.bool)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(_CONSTANT)
        return result
