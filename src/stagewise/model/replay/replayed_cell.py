"""A cell that runs its part of the model's own forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.model.cell import Piece
from stagewise.model.replay.handover import Handover, Required, Returned
from stagewise.model.replay.replayed_call import Run
from stagewise.model.replay.skeleton import Skeleton

Owners = Sequence[tuple[int, str, nn.Module]]


class ReplayedCell(Piece):
    """Part `index` of the model: its block, and the code of forward around it.

    `owners` are what it holds, as for `owned`; `names` are those of all blocks.
    """

    def __init__(
        self,
        index: int,
        skeleton: Skeleton,
        names: Sequence[str],
        owners: Owners,
        required: Required,
        input_names: Sequence[str],
    ) -> None:
        super().__init__()
        self._index, self._skeleton, self._names = index, skeleton, tuple(names)
        self._required = required
        self.input_names, self.is_first = tuple(input_names), index == 0
        for count, (place, path, module) in enumerate(owners):
            self.hold(f"m{count}", place, path, module)

    def forward(self, value: Any = None, **inputs: Any) -> Any:
        """Continue from the previous cell's output; `inputs` are the model's own, by name."""
        is_last = self._index == len(self._names) - 1
        if isinstance(value, Returned):
            return value.output if is_last else value
        if isinstance(value, Handover) and value.ledger.block > self._index:
            return value  # the model skipped this block
        arriving = value if isinstance(value, Handover) else None
        block = next(m for _, path, m in self.owned() if path == self._names[self._index])
        run = Run(
            self._skeleton,
            self._names,
            self._index,
            {self._index: block},
            self._state,
            self._required,
            arriving,
        )
        self._skeleton.train(self.training)
        return run.run(inputs, self._device(arriving, inputs))

    def _state(self, name: str) -> torch.Tensor | None:
        """Return the parameter or buffer of this name; None if the cell does not hold it."""
        for _, path, module in self.owned():
            if path and not name.startswith(f"{path}."):
                continue
            *above, leaf = name.removeprefix(f"{path}." if path else "").split(".")
            for part in above:
                child = module._modules.get(part)
                if child is None:
                    break
                module = child
            else:
                found = module._parameters.get(leaf, module._buffers.get(leaf))
                if found is not None:
                    return found
        return None

    def _device(self, arriving: Handover | None, inputs: dict[str, Any]) -> torch.device:
        own = next(self.parameters(), None)
        if own is not None:
            return own.device
        given = (arriving.tensors if arriving else (), inputs)
        tensors = (t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor))
        return next((t.device for t in tensors), torch.device("cpu"))
