"""A cell that runs its part of the model's own forward, or those of the next cells as well.

A stage's cells run in one call, since each call begins with what comes before the first block.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.model.cell import Piece, Together
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
        return self._run((self,), lambda index: None, value, **inputs)

    def together(self, others: Sequence[nn.Module]) -> Together | None:
        cells = [self, *(each for each in others if isinstance(each, ReplayedCell))]
        same = len(cells) == 1 + len(others) and all(
            each._skeleton is self._skeleton and each._index == self._index + number
            for number, each in enumerate(cells)
        )
        return partial(self._run, cells) if same else None

    def _run(
        self,
        cells: "Sequence[ReplayedCell]",
        enter: Callable[[int], object],
        value: Any = None,
        /,
        **inputs: Any,
    ) -> Any:
        """Run `cells`, of which this is the first."""
        numbers = range(self._index, self._index + len(cells))
        is_last = numbers[-1] == len(self._names) - 1
        if isinstance(value, Returned):
            return value.output if is_last else value
        if isinstance(value, Handover) and value.ledger.block > numbers[-1]:
            return value  # the model skipped these blocks
        arriving = value if isinstance(value, Handover) else None
        run = Run(
            self._skeleton,
            self._names,
            numbers,
            {each._index: each._block() for each in cells},
            partial(_state_in, cells),
            self._required,
            arriving,
        )
        run.enter = enter
        self._skeleton.train(self.training)
        return run.run(inputs, self._device(arriving, inputs))

    def _block(self) -> nn.Module:
        return next(m for _, path, m in self.owned() if path == self._names[self._index])

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


def _state_in(cells: Sequence[ReplayedCell], name: str) -> torch.Tensor | None:
    """Return the parameter or buffer of this name; None if none of the cells holds it."""
    return next((found for cell in cells if (found := cell._state(name)) is not None), None)
