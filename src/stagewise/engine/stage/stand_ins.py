"""Stand-ins: leaves that replace a tied parameter in the cells that use it, for one call.

Every cell that uses a tied parameter gets its own leaf, so that gradients arrive by cell and are
summed once, in an order that does not depend on the partition.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn

from stagewise.engine.stage.gradient import LOW_PRECISION, Gradient, WideSums, dense_like, taken
from stagewise.model.cell import Cell

_Forward = Callable[..., object]


@dataclass(frozen=True)
class _Place:
    """The module and attribute where a using cell keeps a tied parameter."""

    module: nn.Module
    attribute: str
    parameter: nn.Parameter


class StandIns:
    """The leaves that replace tied parameters in one call."""

    def __init__(
        self,
        places: Mapping[int, Sequence[_Place]] | None = None,
        leaves: Mapping[tuple[int, nn.Parameter], nn.Parameter] | None = None,
        before: Mapping[nn.Parameter, Gradient] | None = None,
    ) -> None:
        self.cells, self._leaves = places or {}, leaves or {}
        self.before = before or {}  # the parameters' gradients before the step
        self._wide = WideSums()  # keyed by (cell, parameter)

    @contextmanager
    def inside(self, cell: int) -> Iterator[None]:
        """Run cell `cell` inside, with its stand-ins in place."""
        places = [p for p in self.cells[cell] if (cell, p.parameter) in self._leaves]
        for place in places:  # setattr, since nn.LSTM and the like also keep a list
            setattr(place.module, place.attribute, self._leaves[cell, place.parameter])
        try:
            yield
        finally:
            for place in places:
                setattr(place.module, place.attribute, place.parameter)

    def around(self, calls: Sequence[tuple[Cell, _Forward]]) -> list[tuple[Cell, _Forward]]:
        """Wrap `calls` to run with their cells' stand-ins in place."""
        return [
            (cell, partial(self._run, cell.index, forward) if cell.index in self.cells else forward)
            for cell, forward in calls
        ]

    def _run(self, cell: int, forward: _Forward, *given: object) -> object:
        with self.inside(cell):
            return forward(*given)

    def sum_in_float32(self) -> None:
        """Sum the gradients of low-precision leaves in float32."""
        for key, leaf in self._leaves.items():
            if leaf.dtype in LOW_PRECISION:
                self._wide.follow(key, leaf)

    def take_gradient(self, cell: int, parameter: nn.Parameter) -> Gradient:
        """Take the gradient of `parameter` in `cell`, dense and on the parameter's device."""
        gradient = taken(self._leaves[cell, parameter])
        total = self._wide.pop((cell, parameter))
        return dense_like(parameter, gradient if total is None else total)


NO_STAND_INS = StandIns()


def _places(root: nn.Module) -> Iterator[_Place]:
    for module in root.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield _Place(module, attribute, parameter)
