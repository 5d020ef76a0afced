"""Cells keep the modules and parameters that their Pipeline was built with.

Ties, sums over replicas, float32 sums and running statistics are found when a Pipeline is built;
a parameter that came later (by parametrizing, by an adapter) would be left out of them in silence.
"""

import operator
from collections.abc import Iterable

from torch import nn

from stagewise.errors import ModelError
from stagewise.model.cell import Cell

Parts = dict[str, nn.Module | nn.Parameter | None]


class Unchanged:
    """Remembers what `cells` are made of."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        modules = {module: cell for cell in cells for module in cell.module.modules()}
        self._built = [(cell, module, _parts(module)) for module, cell in modules.items()]

    def check(self) -> None:
        """Raise ModelError if a module or parameter has come, gone, or been replaced."""
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
