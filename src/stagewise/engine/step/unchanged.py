"""What a Pipeline was built from stays as it was.

Ties, sums over replicas, float32 sums and running statistics are found when a Pipeline is built;
a parameter that came later (by parametrizing, by an adapter) would be left out of them in silence.
And cells of a captured model hold what its forward decided then by the user's own module, whose
attributes, hooks or submodules they do not see (`stagewise.model.watch`).
"""

import operator
from collections.abc import Sequence

from torch import nn

from stagewise.errors import ModelError
from stagewise.model.cell import Cell, Piece

Parts = dict[str, nn.Module | nn.Parameter | None]


class Unchanged:
    """Remembers what `cells` are made of."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        modules = {module: cell for cell in cells for module in cell.module.modules()}
        self._built = [(cell, module, _parts(module)) for module, cell in modules.items()]
        pieces = (cell.module for cell in cells if isinstance(cell.module, Piece))
        self._watches = {piece.watch for piece in pieces if piece.watch is not None}

    def check(self, *, training: bool) -> None:
        """Raise ModelError if what was captured has changed, or in training what the cells hold."""
        for watch in self._watches:
            changed = watch.changed()
            if changed:
                raise ModelError(
                    f"{', '.join(changed[:3])} changed after the model was captured, which its "
                    "cells would miss; pass what changes to forward as a tensor, or keep it in a "
                    "buffer and change that in place (under pipe.module, on every rank), or "
                    "capture the model and build the Pipeline anew"
                )
        if training:
            self._check_cells()

    def _check_cells(self) -> None:
        for cell, module, before in self._built:
            now = _parts(module)
            if len(now) == len(before) and all(map(operator.is_, now.values(), before.values())):
                continue
            names = [name for name in [*before, *now] if now.get(name) is not before.get(name)]
            raise ModelError(
                f"{', '.join(dict.fromkeys(names))} of a {type(module).__name__} in cell "
                f"{cell.name!r} came, went or was replaced after the Pipeline was built, which "
                "would train it wrongly; change the model first (parametrize it, add adapters, "
                "load with assign=True) and then build the Pipeline"
            )


def _parts(module: nn.Module) -> Parts:
    return {**module._parameters, **module._modules}
