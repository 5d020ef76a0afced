"""Run a chain's cells one by one without the engine, including skips.

Between two cells, live skips and the value are one pytree, so both are split and joined alike.
"""

from collections.abc import Mapping

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.markers import unmarked
from stagewise.engine.stage.keywords import invoke
from stagewise.engine.step.admission import positional
from stagewise.model.cell import Cell, Chain
from stagewise.model.skip import Frame, Stashed, running
from stagewise.model.skip_pairs import Skip


def _copy(value: object) -> object:
    return pytree.tree_map_only(torch.Tensor, torch.clone, value)


class CellRunner:
    """Runs the cells of a chain."""

    def __init__(self, chain: Chain, inputs: object) -> None:
        self._num_args = positional(inputs)
        self._last = len(chain) - 1
        self._live: list[tuple[Skip, ...]] = []  # after each cell
        live: list[Skip] = []
        for cell in chain:
            live = [s for s in live if s not in cell.skips.pops] + [*cell.skips.stashes]
            self._live.append(tuple(live))
        self._scopes = {scope.path: scope for cell in chain for scope in cell.skips.scopes}

    def run(self, cell: Cell, value: object, keywords: Mapping[str, object]) -> object:
        """Return the cell's output for `value`, which the previous cell returned or the batch is.

        The cell gets copies of the batch's `keywords` that it names.
        """
        names = cell.keywords(self._num_args if cell.index == 0 else 1)
        own = {n: _copy(unmarked(keywords[n])) for n in names if n in keywords}
        if not self._scopes:
            return invoke(cell.module, value, own)
        frames = {path: Frame(scope.own_names) for path, scope in self._scopes.items()}
        if cell.index:
            assert isinstance(value, tuple)
            value, *stashed = value
            for skip, part in zip(self._live[cell.index - 1], stashed, strict=True):
                frames[skip.scope].stashed[skip.name] = Stashed(skip.name, part)
        with running(tuple(frames[scope.path] for scope in cell.skips.scopes)):
            output = invoke(cell.module, value, own)
        if cell.index == self._last:
            return output
        live = self._live[cell.index]
        return output, *(frames[skip.scope].stashed[skip.name].unchanged() for skip in live)
