"""Random numbers from other than torch's default generators: Python's, NumPy's, generator objects.

Problem: a recomputation would draw other numbers than its forward, and the gradients would belong
to neither. Seeding every such source before every cell would slow down each instruction.
Idea: in the first call of a mode, all sources that the cells can reach are seeded before every cell
and inspected after it. Those whose state moved are seeded before every cell from then on, as the
default generators are; the others cost nothing. A source that first moves in a later call is
noticed at the end of that call, and watched from the next one on.
"""

import ctypes
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType

import numpy as np
import torch
from torch import nn

from stagewise.model.forward.visible import Sight, names_in

_32_BITS = (1 << 32) - 1
_MT19937_BYTES = 4 * 625  # its 624 words, and the position in them


@dataclass(frozen=True, eq=False)
class Source:
    """A random number generator: how to read, seed and write its state."""

    name: str
    read: Callable[[], object]
    seed: Callable[[int], object]
    write: Callable[..., object]
    moved: Callable[[], object] | None = None  # faster than `read`; changes when numbers are drawn


def _of_bits(generator: np.random.Generator) -> Source:
    bits = generator.bit_generator

    def write(state: Mapping[str, object]) -> None:
        bits.state = state

    return Source(
        "a numpy.random.Generator",
        lambda: bits.state,
        lambda number: write(type(bits)(number).state),
        write,
    )


def _numpy_position() -> object:
    bits = np.random.mtrand.get_bit_generator()
    if type(bits) is not np.random.MT19937:
        return np.random.get_state()
    return ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES)


_Reading = tuple[Source, Callable[[], object], object]  # how a state was read, and the state
PYTHON = Source("Python's random", random.getstate, random.seed, random.setstate)
NUMPY = Source(
    "numpy.random",
    np.random.get_state,
    lambda number: np.random.seed(number & _32_BITS),
    np.random.set_state,
    _numpy_position,
)
_KINDS: dict[type, Callable[..., Source]] = {
    torch.Generator: lambda g: Source("a torch.Generator", g.get_state, g.manual_seed, g.set_state),
    random.Random: lambda g: Source("a random.Random", g.getstate, g.seed, g.setstate),
    np.random.RandomState: lambda g: Source(
        "a numpy.random.RandomState",
        g.get_state,
        lambda number: g.seed(number & _32_BITS),
        g.set_state,
    ),
    np.random.Generator: _of_bits,
}


class Draws:
    """The sources that `codes` (modules, a loss function) may draw from, and those they did."""

    def __init__(self, codes: Iterable[object]) -> None:
        self._codes = [*codes]
        self._sources: tuple[Source, ...] | None = None
        self._drawn: list[Source] = []
        self._seeded: list[_Reading] = []  # since the last `enter`, while watching
        self._states: list[_Reading] = []  # at the beginning of the call
        self._watching = False
        self.active = False  # whether `enter` has anything to do

    @property
    def names(self) -> list[str]:
        """The names of the sources that were drawn from."""
        return sorted({source.name for source in self._drawn})

    def enter(self, number: int) -> None:
        """Seed the sources with `number`, right before a cell runs."""
        if not self._watching:
            for source in self._drawn:
                source.seed(number)
            return
        self.look()
        for source in self._all():
            source.seed(number)
            read = source.moved or source.read
            self._seeded.append((source, read, read()))

    def look(self) -> list[Source]:
        """Return the sources that moved since `enter`, and record them as drawn from."""
        moved = [source for source, read, state in self._seeded if not _same(state, read())]
        self._drawn += [source for source in moved if source not in self._drawn]
        self._seeded.clear()
        return moved

    @contextmanager
    def kept(
        self, *, watch: bool = False, guard: bool = False, undo: bool = False
    ) -> Iterator[list[Source]]:
        """Restore the state of seeded sources at the end; of all sources with `undo`.

        With `watch`, every cell inside is watched. With `guard`, the list then holds the sources
        that moved without having been seeded.
        """
        found: list[Source] = []
        self._watching = watch
        self.active = watch or bool(self._drawn)
        sources = self._all() if watch or guard or undo else self._drawn
        whole = undo or watch  # states are put back
        states = self._states = []
        for source in sources:
            quick = None if whole or source in self._drawn else source.moved
            read = quick or source.read
            states.append((source, read, read()))
        try:
            yield found
            self.look()
            found += self.late() if guard else ()
        finally:
            self._states = []
            self._watching, self.active = False, bool(self._drawn)
            self._seeded.clear()
            for source, _, state in states:
                if whole or source in self._drawn:
                    source.write(state)

    def late(self) -> list[Source]:
        """Return the sources that moved in this call so far without being watched or seeded."""
        if self._watching:
            return []
        return [
            source
            for source, read, state in self._states
            if source not in self._drawn and not _same(state, read())
        ]

    def _all(self) -> tuple[Source, ...]:
        if self._sources is None:
            self._sources = (PYTHON, NUMPY, *_own(self._codes))
        return self._sources


_BOUND = MethodType, BuiltinFunctionType  # bound methods, whose generator is `__self__`


def _own(codes: Sequence[object]) -> Iterator[Source]:
    modules = [code for code in codes if isinstance(code, nn.Module)]
    values = [node.value for node in (Sight(named_only=True).walk(*modules) if modules else ())]
    values += [code for code in codes if not isinstance(code, nn.Module)]
    values += [value.__self__ for value in values if isinstance(value, _BOUND)]
    inside = [*itertools.chain.from_iterable(map(_inside, values))]
    inside += [value.__self__ for value in inside if isinstance(value, _BOUND)]
    seen: set[int] = {id(torch.default_generator)}
    for value in (*values, *inside):
        kind = next((kind for kind in _KINDS if isinstance(value, kind)), None)
        if kind is not None and id(value) not in seen:
            seen.add(id(value))
            yield _KINDS[kind](value)


def states_in(module: nn.Module) -> list[object]:
    """Return the states of the generators that `module` and those inside hold as attributes."""
    held = [value for inner in module.modules() for value in vars(inner).values()]
    return [_KINDS[type(value)](value).read() for value in held if type(value) in _KINDS]


def same_states(ones: Sequence[object], others: Sequence[object]) -> bool:
    """Return whether nothing was drawn between the two."""
    return all(map(_same, ones, others))


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, FunctionType):
        known = value.__globals__
        closed = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        named = [known[name] for name in names_in(value.__code__) if name in known]
        return [*closed, *named, *(value.__defaults__ or ())]
    if isinstance(value, dict):  # what it holds: its own values() may import what it names
        return list(dict.values(value))
    if isinstance(value, list | tuple | set):
        return list(value)
    return [*getattr(value, "__dict__", {}).values()]


def _is_filled(cell: object) -> bool:
    try:
        return cell.cell_contents is not None  # type: ignore[attr-defined]
    except ValueError:
        return False


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)  # type: ignore[arg-type]
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) < 16:
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
