"""Cells: those of a plain chain, and the pieces of a captured model."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from stagewise.model.forward.watch import Watch
from stagewise.model.skip_pairs import NO_SKIPS, CellSkips

Together = Callable[..., object]


class Holder(nn.Module):
    """Represents a module that is spread over cells: holds some of its parameters and buffers.

    `order` are the names of all of the module's; `constant` those of buffers that no cell changes.
    """

    def __init__(self, order: Iterable[str] = ()) -> None:
        super().__init__()
        self.order = tuple(order)
        self.constant: set[str] = set()


class Piece(nn.Module):
    """A piece of a captured model.

    It takes tensors of the batch under `input_names`. The previous cell's output is its only
    positional argument; the first piece has none.
    """

    input_names: tuple[str, ...] = ()
    is_first: bool = False
    watch: Watch | None = None  # over the captured module

    def __init__(self) -> None:
        super().__init__()
        self._owned: list[tuple[int, str, str]] = []  # place, path in the model, name here

    def hold(self, name: str, place: int, path: str, module: nn.Module) -> None:
        """Hold a module under `name`; see `owned`."""
        self._owned.append((place, path, name))
        self.add_module(name, module)

    def together(self, others: Sequence[nn.Module]) -> "Together | None":
        """Return what runs this piece and `others`, which follow it, in one call; None: nothing.

        It is called as this piece is, with a first argument more: to be called with the number, in
        the chain, of each of `others` before that runs.
        """
        return None

    def owned(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield (place in the plain model's order, path, module) of everything it holds.

        The module is the plain model's own, or a Holder.
        """
        for place, path, name in self._owned:
            yield place, path, self.get_submodule(name)


@dataclass(frozen=True)
class Cell:
    """One cell: its position in the chain, its path in the model (`"0.1"`), module and skips."""

    index: int
    name: str
    module: nn.Module
    skips: CellSkips = NO_SKIPS

    def named_modules(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules in the cell, by their paths in the model."""
        known: set[nn.Module] = set()
        for path, root in self.roots():
            yield from root.named_modules(known, path, remove_duplicate)

    def roots(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that make up the cell, by their paths in the model."""
        if isinstance(self.module, Piece):
            return [(path, module) for _, path, module in self.module.owned()]
        return [(self.name, self.module)]

    def keywords(self, num_args: int = 1) -> tuple[str, ...]:
        """Return the names `forward` takes besides `num_args` positional arguments."""
        return self.takes.beside(num_args)

    @property
    def in_words(self) -> str:
        """What errors call it."""
        return f"cell {self.name!r} ({type(self.module).__name__})"

    @property
    def trainable_bytes(self) -> int:
        """The bytes of its parameters that require gradients."""
        return sum(p.nbytes for p in self.module.parameters() if p.requires_grad)

    @cached_property
    def takes(self) -> "ForwardNames":
        """The names of its `forward`'s parameters."""
        return ForwardNames(*parameter_names(self.module))


@dataclass(frozen=True)
class ForwardNames:
    """The parameter names of a cell's `forward`, without the cell."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]

    def beside(self, num_args: int) -> tuple[str, ...]:
        """Return the names it takes besides `num_args` positional arguments."""
        return self.positional[num_args:] + self.keyword_only


Chain = tuple[Cell, ...]


def together(cells: Chain) -> Together | None:
    """Return what runs `cells` in one call, if they can; see `Piece.together`."""
    first, *others = [cell.module for cell in cells]
    return first.together(others) if others and isinstance(first, Piece) else None


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameter_names(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of `forward`'s positional and keyword-only parameters.

    Without `*args` and `**kwargs`; a positional-only parameter gets a name no keyword can have.
    """
    if isinstance(module, Piece):
        carried = () if module.is_first else ("value (positional only)",)
        return (*carried, *module.input_names), ()
    module = getattr(module, "_orig_mod", module)  # torch.compile's forward hides the signature
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature
        return (), ()
    positional = tuple(
        p.name if p.kind in _BY_NAME else f"{p.name} (positional only)"
        for p in parameters
        if p.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    )
    only = tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
    return positional, only
