"""Pair skips between cells, from their declarations, before anything runs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from stagewise.errors import ModelError
from stagewise.model.skip import DECLARED, Declared, SkipScope


@dataclass(frozen=True)
class Scope:
    """A SkipScope by its path in the model."""

    path: str
    own_names: frozenset[str] | None


@dataclass(frozen=True)
class Skip:
    """A name in its scope."""

    scope: str  # the scope's path
    name: str

    def __str__(self) -> str:
        return f"{self.name!r}" + f" (of the SkipScope {self.scope!r})" * bool(self.scope)


@dataclass(frozen=True)
class CellSkips:
    """The scopes around a cell, outermost first, and the skips it exchanges with other cells."""

    scopes: tuple[Scope, ...] = ()
    stashes: tuple[Skip, ...] = ()
    pops: tuple[Skip, ...] = ()


NO_SKIPS = CellSkips()


def enter(scopes: tuple[Scope, ...], path: str, module: nn.Module) -> tuple[Scope, ...]:
    """Return the scopes around the children of `module`."""
    if isinstance(module, SkipScope):
        return (*scopes, Scope(path, module.own_names))
    return scopes


def skips_of(cell: str, module: nn.Module, scopes: tuple[Scope, ...]) -> CellSkips:
    """Return what the cell `cell` (a path) declares, including the modules inside it."""
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
                        "is in no SkipScope for it; build the model as SkipScope(...) instead of "
                        "nn.Sequential(...)"
                    )
                skips.append(Skip(scope.path, name))
    return CellSkips(scopes, tuple(stashes), tuple(pops))


def between_cells(cells: Sequence[tuple[str, CellSkips]]) -> list[CellSkips]:
    """Return the skips between `cells` (paths and declarations, in running order).

    A skip that a cell both stashes and pops stays inside it, unless the counts say that it also
    arrives (more pops, and an earlier cell stashed it) or leaves (more stashes, and a later cell
    pops it). Raises ModelError for a cell that would forward a name that it received.
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
                    f"cell {cell!r} pops {skip} and stashes it again; {_TWICE} give the second "
                    "another name"
                )
            leaves = not arrives and surplus > 0 and _is_popped(skip, cells[index + 1 :])
            stashes = [s for s in stashes if s != skip] + [skip] * leaves
            pops = [s for s in pops if s != skip] + [skip] * arrives
        waiting = (waiting - set(pops)) | set(stashes)
        found.append(CellSkips(skips.scopes, tuple(stashes), tuple(pops)))
    return found


def _is_popped(skip: Skip, cells: Sequence[tuple[str, CellSkips]]) -> bool:
    """Return whether one of `cells` pops a skip that its own modules do not stash."""
    return any(skips.pops.count(skip) > skips.stashes.count(skip) for _, skips in cells)


def check_skips(cells: Iterable[tuple[str, CellSkips]]) -> None:
    """Raise ModelError unless each skip is stashed once, and later popped once.

    `cells` are (path, skips) in running order.
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
                    "another name, or put it in its own SkipScope"
                )
            stashed[skip] = cell
    for skip, cell in stashed.items():
        if skip not in popped:
            raise ModelError(
                f"cell {cell!r} stashes {skip}, which no later cell pops; declare it with "
                f"@skippable(pop=[{skip.name!r}]) in a later cell of the same SkipScope"
            )


_TWICE = "a skip goes from one cell to one cell:"


def _declarations(
    module: nn.Module, scopes: tuple[Scope, ...]
) -> Iterator[tuple[Declared, tuple[Scope, ...]]]:
    """Yield the declarations of `module` and its submodules, with the scopes inside `module`."""
    declared = getattr(module, DECLARED, None)
    if declared is not None:
        yield declared, scopes
    inside = enter(scopes, "", module)
    for child in module.children():
        yield from _declarations(child, inside)


def _owner(name: str, scopes: tuple[Scope, ...]) -> Scope | None:
    own = (s for s in reversed(scopes) if s.own_names is None or name in s.own_names)
    return next(own, None)
