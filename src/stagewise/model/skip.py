"""Skip connections: one cell stashes a value under a name, and a later cell pops it.

A chain passes a value from cell to cell, so a U-Net's long connection would have to pass through
every cell, and every stage, on its way. Skips go straight to the stage that pops them. The idea
is torchgpipe's (arXiv:2004.09910, section 4), with calls instead of generators, and with names
scoped by the model's structure instead of namespace objects, so that copies of a block, the same
block used twice and nested blocks just work.

Invariant: within its scope a skip is stashed once and popped once, by a later cell.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.errors import CellError, ModelError

_Cell = TypeVar("_Cell", bound="nn.Module | type[nn.Module]")
DECLARED = "_stagewise_skips"  # on a cell's class, or on one cell


class SkipScope(nn.Sequential):
    """An `nn.Sequential` whose cells may stash and pop; a model with skips is one.

    A name belongs to the innermost SkipScope around its cell, so a block that is a SkipScope can
    occur several times in a model, also nested in itself.

    Args:
        modules: as for `nn.Sequential`.
        own_names: the names that belong to this scope (None: all); others belong to the scope
            around it.

    Raises:
        CellError: when called directly, a cell pops a name that is not stashed, or a stashed name
            is not popped.

    Example:
        >>> import torch, stagewise
        >>> @stagewise.skippable(stash=["x"])
        ... class Open(torch.nn.Module):
        ...     def forward(self, x):
        ...         stagewise.stash("x", x)
        ...         return x.sin()
        >>> @stagewise.skippable(pop=["x"])
        ... class Close(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + stagewise.pop("x")
        >>> def block(*inside):
        ...     return stagewise.SkipScope(Open(), *inside, Close())
        >>> block(block(torch.nn.Tanh()), torch.nn.Linear(2, 2))(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """

    def __init__(self, *modules: Any, own_names: Iterable[str] | None = None) -> None:
        super().__init__(*modules)
        self.own_names = None if own_names is None else frozenset(own_names)

    def forward(self, input: Any) -> Any:
        frame = Frame(self.own_names)
        with running((*_frames.get(), frame)):
            output = super().forward(input)  # type: ignore[no-untyped-call]
        if frame.stashed:
            raise CellError(
                f"{', '.join(map(repr, frame.stashed))} stashed but not popped in its SkipScope; "
                "pop it in a later cell, or do not stash it"
            )
        return output


@dataclass(frozen=True)
class Declared:
    """The names that one forward of a cell stashes and pops."""

    stash: tuple[str, ...]
    pop: tuple[str, ...]


def skippable(*, stash: Sequence[str] = (), pop: Sequence[str] = ()) -> Callable[[_Cell], _Cell]:
    """Declare what a class of cells, or one cell, stashes and pops in every forward.

    Use it as a class decorator; for names that differ from cell to cell, apply it to the cell:
    `skippable(stash=[name])(self)`. Raises ModelError for a bare string, or a forward that yields.
    """
    for names in (stash, pop):
        if isinstance(names, str):
            raise ModelError(f"skippable got the string {names!r}; give a list: [{names!r}]")

    def declare(cell: _Cell) -> _Cell:
        if inspect.isgeneratorfunction(cell.forward):  # torchgpipe's are
            raise ModelError(
                f"{cell.forward.__qualname__} yields, but stash and pop are calls here: write "
                "stagewise.stash(name, value) for `yield stash(name, value)`, and "
                "value = stagewise.pop(name) for `value = yield pop(name)`"
            )
        setattr(cell, DECLARED, Declared(tuple(stash), tuple(pop)))
        return cell

    return declare


def stash(name: str, value: object) -> None:
    """Stash `value`, a tensor or any pytree, for the later cell that pops `name`.

    Raises CellError if `name` is already stashed, or belongs to no SkipScope.
    """
    frame = _frame_of(name, "stash")
    if name in frame.stashed:
        raise CellError(f"stash({name!r}): already stashed; give the second another name")
    frame.stashed[name] = Stashed(name, value)


def pop(name: str) -> Any:
    """Return, and remove, the value that an earlier cell stashed under `name`.

    Raises CellError if there is none, or if it was changed in place since it was stashed.
    """
    frame = _frame_of(name, "pop")
    if name not in frame.stashed:
        raise CellError(
            f"pop({name!r}): nothing is stashed under this name; stash it in an earlier cell, and "
            f"declare this cell with @skippable(pop=[{name!r}])"
        )
    stashed = frame.stashed.pop(name)
    frame.popped.append(stashed)
    return stashed.unchanged()


class Stashed:
    """A stashed value within one process."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value
        leaves = pytree.tree_leaves(value)
        self._tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._versions = [*map(_version, self._tensors)]

    def unchanged(self, when: str = "after it was stashed; stash a clone of it") -> object:
        """Return the value; CellError if it was changed in place since it was stashed.

        Another stage would get the value from before the change, so the result would depend on
        the cut.
        """
        if self.changed():
            raise CellError(
                f"{self.name!r} was changed in place {when}, or create a new tensor in the "
                "operation that changes it (inplace=True?)"
            )
        return self.value

    def changed(self) -> list[torch.Tensor]:
        """Return its tensors that were changed in place since."""
        pairs = zip(self._tensors, self._versions, strict=True)
        return [tensor for tensor, version in pairs if _version(tensor) != version]


class Frame:
    """The stashed values of one scope while its cells run."""

    def __init__(
        self, own_names: frozenset[str] | None, stashed: dict[str, Stashed] | None = None
    ) -> None:
        self.own_names = own_names
        self.stashed = stashed if stashed is not None else {}
        self.popped: list[Stashed] = []


_frames: ContextVar[tuple[Frame, ...]] = ContextVar("stagewise_skips", default=())


@contextmanager
def running(frames: tuple[Frame, ...]) -> Iterator[None]:
    """Make `stash` and `pop` inside use `frames`, innermost last."""
    token = _frames.set(frames)
    try:
        yield
    finally:
        _frames.reset(token)


def _frame_of(name: str, what: str) -> Frame:
    for frame in reversed(_frames.get()):
        if frame.own_names is None or name in frame.own_names:
            return frame
    raise CellError(
        f"{what}({name!r}) in a cell that is in no SkipScope for it; build the model as "
        "SkipScope(...) instead of nn.Sequential(...), and declare the cell with "
        f"@skippable({what}=[{name!r}])"
    )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
