"""What a cell made by stagewise from a captured model says of itself."""

from abc import abstractmethod
from collections.abc import Iterator

from torch import nn


class Holder(nn.Module):
    """Stands for a module that is spread over cells: holds some of its parameters and buffers."""


class Piece(nn.Module):
    """A piece of a captured model.

    It takes tensors of the batch under `input_names`. What the cell before returned is its only
    positional argument; the first piece has none.
    """

    input_names: tuple[str, ...] = ()
    is_first: bool = False

    @abstractmethod
    def owned(self) -> Iterator[tuple[int, str, nn.Module]]:
        """What it holds: a place in the plain model's order, a path there, and the module.

        The module is the plain model's own, or a Holder.
        """
