"""Find parameters that several cells use: tied weights, shared modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from stagewise.model.cell import Chain
from stagewise.model.chain import module_tree

V = TypeVar("V")


@dataclass(frozen=True)
class Tied:
    """A parameter used by more than one cell.

    `names` are all of its names in the plain model's order (`named_parameters()` only yields the
    first, `state_dict()` all); `cells` are the using cells' indices.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    cells: tuple[int, ...]
    copies: tuple[nn.Parameter, ...] = ()  # others on this rank, sharded with another stage


def find_tied(chain: Chain) -> tuple[Tied, ...]:
    """Return the parameters that several cells use, in the plain model's order."""
    cells: dict[nn.Parameter, list[int]] = {}
    for cell in chain:
        for parameter in cell.module.parameters():
            cells.setdefault(parameter, []).append(cell.index)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module_tree(chain).named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return tuple(
        Tied(parameter, tuple(all_names), tuple(cells[parameter]))
        for parameter, all_names in names.items()
        if len(cells[parameter]) > 1
    )


def with_all_names(state: Mapping[str, V], ties: tuple[Tied, ...]) -> dict[str, V]:
    """Return `state` with one value under all names of a tied parameter: the last one given.

    The plain model's `load_state_dict` keeps that one too.
    """
    whole = dict(state)
    for tied in ties:
        given = [name for name in tied.names if name in state]
        if given:
            whole.update(dict.fromkeys(tied.names, state[given[-1]]))
    return whole
