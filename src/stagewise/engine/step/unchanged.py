"""Check that the model is still the one a Pipeline was built from.

Ties, sums over replicas, float32 sums and running statistics are found when a Pipeline is built;
a parameter added later (by a parametrization or an adapter) would silently be left out. A parameter
must also keep its values until the end of the step, since all microbatches must see the same. And
the cells of a captured model have fixed what its forward decided from attributes, hooks and
submodules of the user's module, which they no longer see (`stagewise.model.forward.watch`). Nor is
a cell seen that is put into the user's own Sequential or list later. That is watched by weak
references: what this rank does not run stays the user's to drop.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from operator import itemgetter
from types import FunctionType, ModuleType
from typing import NamedTuple

import torch
from torch import nn

from stagewise.errors import CellError, ModelError
from stagewise.model.cell import Cell, Piece
from stagewise.model.chain import Held, Model, children_in, sequences_in
from stagewise.model.forward.users_code import is_users
from stagewise.model.forward.visible import globals_in

_KINDS = bool, int, float, str, type(None)  # of flags
_OF_MODULES = frozenset(vars(nn.Module()))
_MOST_ENTRIES = 64  # of a namespace within a module
_MOST_CHANGES = 2  # of one flag that are looked at
Parts = dict[str, nn.Module | nn.Parameter | None]


class ModeOf:
    """A rank's mode: that of its part, `root`, but eval if the user's own `model` was in training
    mode when the Pipeline was built and has been put in eval mode since."""

    def __init__(self, root: nn.Module, model: object) -> None:
        known = isinstance(model, nn.Module) and model.training
        self._root, self._model = root, weakref.ref(model) if known else lambda: None

    @property
    def training(self) -> bool:
        """Whether the rank is in training mode, on which all ranks must agree."""
        model = self._model()
        return self._root.training and (not isinstance(model, nn.Module) or model.training)


class _Made(NamedTuple):
    parts: Parts
    ids: tuple[int, ...]  # of the parts, which are kept alive so that no id is reused


class _Sequence(NamedTuple):
    """The user's own Sequential or list, and what it held."""

    path: str
    now: Callable[[], Held | None]
    held: list[tuple[str, weakref.ref[nn.Module]]]

    def changed(self) -> list[str]:
        """The paths of children that differ; one that was emptied or dropped was let go."""
        sequence = self.now()
        now = [] if sequence is None else children_in(sequence)
        if not now or [id(child) for _, child in now] == [id(child()) for _, child in self.held]:
            return []
        before = {name: child() for name, child in self.held}
        names = [n for n in {**before, **dict(now)} if dict(now).get(n) is not before.get(n)]
        return [f"{self.path}.{name}".lstrip(".") for name in names]


class _Flags:
    """The flags in one namespace, or those of `names` there, and how often each has changed."""

    def __init__(self, held: Mapping[str, object], names: Collection[str] | None = None) -> None:
        self._held, self._only, self._times = held, names, Counter[str]()
        self._remember()

    def _remember(self) -> None:
        some = self._held if self._only is None else self._only
        self._names = [name for name in some if type(self._held.get(name)) in _KINDS]
        self._size = len(self._held) if self._only is None else 0
        self._read = itemgetter(*self._names, *self._names[:1]) if self._names else _nothing
        self._values = self._read(self._held)

    def changed(self) -> bool:
        """Whether one that is not ignored has changed since this was last asked."""
        try:
            same_size = self._only is not None or len(self._held) == self._size
            if same_size and self._read(self._held) == self._values:
                return False
        except KeyError:  # one was deleted
            pass
        before = {*zip(self._names, self._values, strict=False)}
        self._remember()
        names = {name for name, _ in before ^ {*zip(self._names, self._values, strict=False)}}
        self._times.update(names)
        return any(self._times[name] <= _MOST_CHANGES for name in names)


def _nothing(held: Mapping[str, object]) -> tuple[object, ...]:
    return ()


def _namespaces(modules: Sequence[nn.Module]) -> list[_Flags]:
    """Where forwards may find flags: in modules, their classes, what they hold, and globals."""
    found: dict[int, _Flags] = {}
    for module in modules:
        own = vars(module)
        held = [value for name, value in own.items() if name not in _OF_MODULES]
        classes = [vars(cls) for cls in type(module).__mro__ if is_users(_file_of(cls))]
        forward = type(module).forward
        if isinstance(forward, FunctionType) and is_users(forward.__code__.co_filename):
            known = forward.__globals__
            names = globals_in(forward.__code__) & known.keys()
            found.setdefault(id(forward), _Flags(known, names))
            held += [known[name] for name in names]
        for namespace in (own, *filter(None, map(_namespace_of, held)), *classes):
            found.setdefault(id(namespace), _Flags(namespace))
    return [*found.values()]


def _file_of(cls: type) -> str:
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or "<"


def _namespace_of(value: object) -> dict[str, object] | None:
    """Return a small dict with names, or that of an object's attributes."""
    if isinstance(value, nn.Module | type | FunctionType | ModuleType | torch.Tensor):
        return None
    found = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    is_small = isinstance(found, dict) and 0 < len(found) <= _MOST_ENTRIES
    return found if is_small and all(type(key) is str for key in found) else None


class Unchanged:
    """Remembers the modules and parameters of `cells`."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        modules = {module: cell for cell in cells for module in cell.module.modules()}
        self._built = [(cell, module, _made_of(module)) for module, cell in modules.items()]
        paths = {module: path for cell in cells for path, module in cell.named_modules()}
        self._names = {
            parameter: f"{paths[module]}.{name}" if paths.get(module) else name
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self._hooked: list[tuple[nn.Parameter, int]] = []  # with their versions before the step
        pieces = (cell.module for cell in cells if isinstance(cell.module, Piece))
        self._watched = {piece.watch: piece for piece in pieces if piece.watch is not None}
        self._sequences: list[_Sequence] = []
        # A compiled module has no attributes of its own: the one inside it is among them too.
        named = {m: type(m).__module__ for m in modules if "training" in vars(m)}
        own = [m for m, of in named.items() if not of.startswith("torch.nn.")]
        self._flags = {training: _namespaces(own) for training in (False, True)}
        self.flags = False  # whether flags have changed before this call

    def follow(self, model: Model, *, all_here: bool) -> None:
        """Watch the sequences of `model`, the user's own, too.

        A plain list can have no weak reference: it is watched where all cells are here.
        """
        for path, sequence in sequences_in(model):
            now: Callable[[], Held | None]
            if isinstance(sequence, nn.Module):
                now = weakref.ref(sequence)
            elif all_here:
                now = partial(_itself, sequence)
            else:
                continue
            held = [(name, weakref.ref(child)) for name, child in children_in(sequence)]
            self._sequences.append(_Sequence(path, now, held))

    def check(self, *, training: bool) -> None:
        """Raise ModelError if the captured model, or in training a cell, has changed."""
        self.flags = True in [flags.changed() for flags in self._flags[training]]
        for watch, piece in self._watched.items():
            changed = watch.changed(piece.training if training else None)
            if changed:
                raise ModelError(
                    f"{', '.join(changed[:3])} changed after the model was captured, and its cells "
                    "would not see that; pass what changes to forward as a tensor, or keep it in a "
                    "buffer and change that in place (under pipe.module, on every rank), or "
                    "capture the model and build the Pipeline again"
                )

        for sequence in self._sequences:
            if names := sequence.changed():
                raise ModelError(
                    f"{', '.join(names[:5])} of the model was added, removed, replaced or moved "
                    "after the Pipeline was built, which goes on with the cells that it was built "
                    "from; change the model before building the Pipeline, or build it again (a "
                    "model no longer needed can be dropped, or emptied)"
                )

        if training:
            self._check_cells()

    def _check_cells(self) -> None:
        """Raise ModelError if a module or parameter was added, removed or replaced in a cell."""
        for cell, module, before in self._built:
            parameters, modules = module._parameters, module._modules
            if (*map(id, parameters.values()), *map(id, modules.values())) != before.ids:
                raise _changed(cell, module, before.parts)
        self._hooked = [
            (parameter, parameter._version)
            for parameter in self._names
            if parameter._post_accumulate_grad_hooks or parameter._backward_hooks
        ]

    def check_values(self, num_microbatches: int) -> None:
        """Raise CellError if a hook changed a parameter before all microbatches were done."""
        for parameter, version in self._hooked if num_microbatches > 1 else ():
            if parameter._version != version:
                raise CellError(
                    f"a hook on the parameter {self._names[parameter]} changed it within the step, "
                    "as an optimizer in the backward pass does: it would be updated for each of "
                    f"the {num_microbatches} microbatches, by a part of the gradient, and that "
                    "cannot be undone here; run the optimizer after the step, or use one microbatch"
                )


def _itself(sequence: Held) -> Held:
    return sequence


def _made_of(module: nn.Module) -> _Made:
    parts = {**module._parameters, **module._modules}
    return _Made(parts, tuple(map(id, parts.values())))


def _changed(cell: Cell, module: nn.Module, before: Parts) -> ModelError:
    now: Parts = {**module._parameters, **module._modules}
    names = [name for name in [*before, *now] if now.get(name) is not before.get(name)]
    return ModelError(
        f"{', '.join(dict.fromkeys(names))} of a {type(module).__name__} in cell {cell.name!r} "
        "was added, removed or replaced after the Pipeline was built, which would train it "
        "wrongly; change the model (parametrize it, add adapters, load with assign=True) before "
        "building the Pipeline"
    )
