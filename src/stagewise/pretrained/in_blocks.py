"""bitsandbytes' quantisation to 4 bits on a CPU, some blocks of a weight at a time.

Problem: on a CPU, bitsandbytes computes it with PyTorch's operators, whose temporaries take two and
a half times the weight in float32, and seven times it in bfloat16. Idea: every block of a weight is
quantised by itself, so the operator gives the same bits for some blocks after others. A weight that
is mapped from its file is so never here whole.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stagewise.free_pages import drop_pages

_OPERATOR = "bitsandbytes::quantize_4bit"
_NUM_AT_ONCE = 1 << 16  # values; a multiple of every block's


class InBlocks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, weights are quantised to 4 bits part by part.

    One that is `mapped` from a file is let go as far as it has been read; a copy of it is not, such
    as of a transposed one: its memory is nobody else's to drop.
    """

    def __init__(self, *, mapped: torch.Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        start = 0 if mapped is None else mapped.data_ptr()
        self._mapped = range(start, start + (0 if mapped is None else mapped.nbytes))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func.name() != _OPERATOR or args[0].device.type != "cpu":
            return func(*args, **given)
        weight, *how = args
        whole, sizes = list[torch.Tensor](), list[int]()
        for number, part in enumerate(weight.reshape(-1).split(_NUM_AT_ONCE)):
            pieces = func(part, *how, **given)
            if part.data_ptr() in self._mapped:
                drop_pages(part)
            if not whole:  # the last part may be smaller than the first, and so than all others
                sizes = [len(piece) for piece in pieces]
                rows = [-(-size * weight.numel() // len(part)) for size in sizes]
                whole = [p.new_empty(n, *p.shape[1:]) for p, n in zip(pieces, rows, strict=True)]
            for all_rows, piece, size in zip(whole, pieces, sizes, strict=True):
                all_rows[number * size :][: len(piece)] = piece
        return tuple(whole)
