"""Skips: what one cell stashes under a name and a later cell pops, past the cells between.

A chain hands a value from cell to cell, so a U-Net's long connection would have to pass through
every cell, and every stage, on its way. Skips go straight to the stage that pops them. The idea
is torchgpipe's (arXiv:2004.09910, section 4), with calls in place of generators, and with names
scoped by the model's structure in place of namespace objects, so that copies of a block, the
same block twice and nested blocks need nothing more.

Invariant: in its scope a skip is stashed once and popped once, by a later cell.
"""

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
_DECLARED = "_stagewise_skips"  # on a cell's class, or on one cell


class SkipScope(nn.Sequential):
    """An `nn.Sequential` whose cells may stash and pop; a model with skips is one.

    A name belongs to the innermost SkipScope around its cell, so a block that is one can stand
    in a model several times, and in itself.

    Args:
        modules: as for `nn.Sequential`.
        own_names: the names that belong to this scope; others belong to the scope around it.
            None means all.

    Raises:
        CellError: called directly, a cell pops what is not there, or nobody pops what is.

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


def skippable(*, stash: Sequence[str] = (), pop: Sequence[str] = ()) -> Callable[[_Cell], _Cell]:
    """Declare what a class of cells, or one cell, stashes and pops in every forward.

    It is a class's decorator; for names that differ from cell to cell call what it returns with
    the cell itself: `skippable(stash=[name])(self)`. Raises ModelError for a bare string.
    """
    for names in (stash, pop):
        if isinstance(names, str):
            raise ModelError(f"skippable got the string {names!r}; give a list: [{names!r}]")

    def declare(cell: _Cell) -> _Cell:
        setattr(cell, _DECLARED, _Declared(tuple(stash), tuple(pop)))
        return cell

    return declare


def stash(name: str, value: object) -> None:
    """Keep `value`, a tensor or any pytree, for the later cell that pops `name`.

    Raises CellError if `name` is stashed already, or if no SkipScope holds it.
    """
    frame = _frame_of(name, "stash")
    if name in frame.stashed:
        raise CellError(f"stash({name!r}): it is stashed already; give the second another name")
    frame.stashed[name] = Stashed(name, value)


def pop(name: str) -> Any:
    """The value that an earlier cell stashed under `name`, which is free again then.

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
    """A value on its way within one process."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value
        leaves = pytree.tree_leaves(value)
        self._tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._versions = [*map(_version, self._tensors)]

    def unchanged(self, when: str = "after it was stashed; stash a clone of it") -> object:
        """The value; raises CellError if it is no more what was stashed.

        A stage that lies elsewhere would get it as it was, and others would not see what is done
        to it there, so the result would hang on the cut.
        """
        if self.changed():
            raise CellError(
                f"{self.name!r} was changed in place {when}, "
                "or let what follows (inplace=True?) make a new tensor"
            )
        return self.value

    def changed(self) -> list[torch.Tensor]:
        """The tensors in it that were changed in place since."""
        pairs = zip(self._tensors, self._versions, strict=True)
        return [tensor for tensor, version in pairs if _version(tensor) != version]


class Frame:
    """What is stashed in one scope while its cells run."""

    def __init__(self, own_names: frozenset[str] | None) -> None:
        self.own_names = own_names
        self.stashed: dict[str, Stashed] = {}
        self.popped: list[Stashed] = []


_frames: ContextVar[tuple[Frame, ...]] = ContextVar("stagewise_skips", default=())


@contextmanager
def running(frames: tuple[Frame, ...]) -> Iterator[None]:
    """Let `stash` and `pop` inside use `frames`, the innermost last."""
    token = _frames.set(frames)
    try:
        yield
    finally:
        _frames.reset(token)


@dataclass(frozen=True)
class Scope:
    """A SkipScope by its path in the model."""

    path: str
    own_names: frozenset[str] | None


@dataclass(frozen=True)
class Skip:
    """A name in its scope."""

    scope: str  # its path
    name: str

    def __str__(self) -> str:
        return f"{self.name!r}" + f" (of the SkipScope {self.scope!r})" * bool(self.scope)


@dataclass(frozen=True)
class CellSkips:
    """The scopes around a cell, outermost first, and what it stashes for and pops from others."""

    scopes: tuple[Scope, ...] = ()
    stashes: tuple[Skip, ...] = ()
    pops: tuple[Skip, ...] = ()


NO_SKIPS = CellSkips()


def enter(scopes: tuple[Scope, ...], path: str, module: nn.Module) -> tuple[Scope, ...]:
    """The scopes around what `module` holds."""
    if isinstance(module, SkipScope):
        return (*scopes, Scope(path, module.own_names))
    return scopes


def skips_of(cell: str, module: nn.Module, scopes: tuple[Scope, ...]) -> CellSkips:
    """What the cell with this path declares, the modules inside it included."""
    stashes: list[Skip] = []
    pops: list[Skip] = []
    for declared, inside in _declarations(module, ()):
        for names, skips in ((declared.stash, stashes), (declared.pop, pops)):
            for name in names:
                if _owner(name, inside) is not None:
                    continue
                scope = _owner(name, scopes)
                if scope is None:
                    raise ModelError(
                        f"cell {cell!r} ({type(module).__name__}) declares the skip {name!r} but "
                        "stands in no SkipScope for it; build the model as SkipScope(...) in "
                        "place of nn.Sequential(...)"
                    )
                skips.append(Skip(scope.path, name))
    return CellSkips(scopes, tuple(stashes), tuple(pops))


def between_cells(cells: Sequence[tuple[str, CellSkips]]) -> list[CellSkips]:
    """Of what `cells` declare (paths and skips in running order), what goes from cell to cell.

    A skip that a cell both stashes and pops stays in it, unless the counts say that it also
    arrives (more pops, and an earlier cell has stashed it) or leaves (more stashes, and a later
    cell pops it). Raises ModelError for a cell that would hand on a name that it received.
    """
    waiting: set[Skip] = set()
    found = []
    for index, (cell, skips) in enumerate(cells):
        stashes, pops = list(skips.stashes), list(skips.pops)
        for skip in [skip for skip in dict.fromkeys(stashes) if skip in pops]:
            surplus = stashes.count(skip) - pops.count(skip)
            arrives = skip in waiting
            if arrives and surplus >= 0:
                raise ModelError(
                    f"cell {cell!r} pops {skip} and stashes it anew; {_TWICE} give the second "
                    "another name"
                )
            leaves = not arrives and surplus > 0 and _is_popped(skip, cells[index + 1 :])
            stashes = [s for s in stashes if s != skip] + [skip] * leaves
            pops = [s for s in pops if s != skip] + [skip] * arrives
        waiting = (waiting - set(pops)) | set(stashes)
        found.append(CellSkips(skips.scopes, tuple(stashes), tuple(pops)))
    return found


def _is_popped(skip: Skip, cells: Sequence[tuple[str, CellSkips]]) -> bool:
    """Whether one of `cells` pops what none of its own modules stashes."""
    return any(skips.pops.count(skip) > skips.stashes.count(skip) for _, skips in cells)


def check_skips(cells: Iterable[tuple[str, CellSkips]]) -> None:
    """Raise ModelError unless each skip is stashed once, and later popped once.

    `cells` are paths and skips in running order.
    """
    stashed: dict[Skip, str] = {}
    popped: dict[Skip, str] = {}
    for cell, skips in cells:
        for skip in skips.pops:
            if skip in popped:
                raise ModelError(
                    f"cells {popped[skip]!r} and {cell!r} both pop {skip}; {_TWICE} stash it under "
                    "two names to use it twice"
                )
            if skip not in stashed:
                raise ModelError(
                    f"cell {cell!r} pops {skip}, which no earlier cell stashes; declare it with "
                    f"@skippable(stash=[{skip.name!r}]) in an earlier cell of the same SkipScope"
                )
            popped[skip] = cell
        for skip in skips.stashes:
            if skip in stashed:
                raise ModelError(
                    f"cells {stashed[skip]!r} and {cell!r} both stash {skip}; {_TWICE} give one "
                    "another name, or put it in a SkipScope of its own"
                )
            stashed[skip] = cell
    for skip, cell in stashed.items():
        if skip not in popped:
            raise ModelError(
                f"cell {cell!r} stashes {skip}, which no later cell pops; declare it with "
                f"@skippable(pop=[{skip.name!r}]) in a later cell of the same SkipScope"
            )


_TWICE = "a skip goes from one cell to one cell:"


@dataclass(frozen=True)
class _Declared:
    stash: tuple[str, ...]
    pop: tuple[str, ...]


def _declarations(
    module: nn.Module, scopes: tuple[Scope, ...]
) -> Iterator[tuple[_Declared, tuple[Scope, ...]]]:
    """What `module` and the modules in it declare, each with the scopes around it in `module`."""
    declared = getattr(module, _DECLARED, None)
    if declared is not None:
        yield declared, scopes
    inside = enter(scopes, "", module)
    for child in module.children():
        yield from _declarations(child, inside)


def _owner(name: str, scopes: tuple[Scope, ...]) -> Scope | None:
    own = (s for s in reversed(scopes) if s.own_names is None or name in s.own_names)
    return next(own, None)


def _frame_of(name: str, what: str) -> Frame:
    for frame in reversed(_frames.get()):
        if frame.own_names is None or name in frame.own_names:
            return frame
    raise CellError(
        f"{what}({name!r}) in a cell that stands in no SkipScope for it; build the model as "
        "SkipScope(...) in place of nn.Sequential(...), and declare the cell with "
        f"@skippable({what}=[{name!r}])"
    )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
