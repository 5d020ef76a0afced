"""Stand-ins: what takes the place of a tied parameter in the cells that use it, for one call.

Every cell that uses a parameter of another cell gets a leaf of its own, so that gradients arrive
by cell and are summed once, in an order that does not depend on the partition.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from stagewise.engine.stage.gradient import LOW_PRECISION, Gradient, WideSums, dense_like, taken


@dataclass(frozen=True)
class _Place:
    """Where a module of a using cell keeps a tied parameter."""

    module: nn.Module
    attribute: str
    parameter: nn.Parameter


class StandIns:
    """What takes the place of tied parameters in one call."""

    def __init__(
        self,
        places: Mapping[int, Sequence[_Place]] | None = None,
        leaves: Mapping[tuple[int, nn.Parameter], nn.Parameter] | None = None,
        before: Mapping[nn.Parameter, Gradient] | None = None,
    ) -> None:
        self.cells, self._leaves = places or {}, leaves or {}  # the cells that have any
        self.before = before or {}  # the gradients that the parameters came with
        self._wide = WideSums()  # by cell and parameter

    @contextmanager
    def inside(self, cell: int) -> Iterator[None]:
        """Run cell `cell` inside, with its stand-ins in place."""
        places = [p for p in self.cells[cell] if (cell, p.parameter) in self._leaves]
        for place in places:  # setattr, since nn.LSTM and its like keep a list besides
            setattr(place.module, place.attribute, self._leaves[cell, place.parameter])
        try:
            yield
        finally:
            for place in places:
                setattr(place.module, place.attribute, place.parameter)

    def sum_in_float32(self) -> None:
        """Let no microbatch's gradient stay in a `.grad` of low precision."""
        for key, leaf in self._leaves.items():
            if leaf.dtype in LOW_PRECISION:
                self._wide.follow(key, leaf)

    def take_gradient(self, cell: int, parameter: nn.Parameter) -> Gradient:
        """What the microbatches left for `parameter` in `cell`, dense and on its device."""
        gradient = taken(self._leaves[cell, parameter])
        total = self._wide.pop((cell, parameter))
        return dense_like(parameter, gradient if total is None else total)


NO_STAND_INS = StandIns()


def _places(root: nn.Module) -> Iterator[_Place]:
    for module in root.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield _Place(module, attribute, parameter)
