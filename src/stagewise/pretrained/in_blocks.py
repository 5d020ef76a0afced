"""bitsandbytes' quantisation to 4 bits on a CPU, some blocks of a weight at a time.

Problem: on a CPU, bitsandbytes computes it with PyTorch's operators, whose temporaries take two and
a half times the weight in float32, and seven times it in bfloat16. Idea: every block of a weight is
quantised by itself, so the operator gives the same bits for some blocks after others.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATOR = "bitsandbytes::quantize_4bit"
_NUM_AT_ONCE = 1 << 16  # values; a multiple of every block's


class InBlocks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, large weights are quantised to 4 bits part by part."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func.name() != _OPERATOR or args[0].device.type != "cpu":
            return func(*args, **given)
        weight, *how = args
        parts = [func(part, *how, **given) for part in weight.reshape(-1).split(_NUM_AT_ONCE)]
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
