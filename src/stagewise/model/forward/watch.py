"""Notice changes of what a model's forward can see since the model was captured.

Cells of a captured model have fixed forward's decisions, so a changed attribute, hook, submodule,
class attribute or global of the user's code would silently be ignored. A check takes some
microseconds per module that is not a layer of torch.nn, and keeps nothing of the model alive.
"""

import weakref
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from stagewise.model.forward.contents import PLAIN, Frozen
from stagewise.model.forward.library import Library
from stagewise.model.forward.users_code import HOOKS_FOR_ALL
from stagewise.model.forward.visible import Node, Sight

Place = tuple[str, str]  # the holder's path, and the item's label in it
Tokens = Mapping[Place, object]
_Mode = tuple[str, "weakref.ref[nn.Module]", bool]  # path, module, whether its mode is another
_CONTAINERS = (list, tuple, dict, set, frozenset)  # compared by contents, not identity


class _Same:
    """Represents an object; equal to another one of the same object while that lives."""

    def __init__(self, value: object, version: int = 0) -> None:
        self._id, self._version = id(value), version
        try:
            self._reference: weakref.ref[object] | None = weakref.ref(value)
        except TypeError:
            self._reference = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unmade) or (
            isinstance(other, _Same)
            and (self._id, self._version) == (other._id, other._version)
            and (self._reference is None or self._reference() is not None)
        )

    __hash__ = None  # type: ignore[assignment]


class _Unmade:
    """Represents a tensor on the meta device, which a Pipeline materialises, or its user let go."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (_Same, _Unmade))

    __hash__ = None  # type: ignore[assignment]


def _registered(model: nn.Module) -> set[int]:
    """Return ids of tensors whose values may change, since the cells hold them too."""
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


def _hooks_for_all() -> tuple[int, ...]:
    """Return the numbers of hooks that torch calls for every module."""
    return tuple(len(getattr(torch_module, name)) for name in HOOKS_FOR_ALL)


def tokens_of(model: nn.Module, nodes: Iterable[Node]) -> dict[Place, object]:
    """Return a token for every item seen, which is equal if nothing has changed."""
    registered = _registered(model)
    found: dict[Place, object] = {}
    for node in nodes:
        for label, item in node.items:
            if isinstance(item, PLAIN):
                token: object = (type(item), item if item == item else "nan")
            elif isinstance(item, Frozen):
                token = (item.kind, item.data)
            elif isinstance(item, _CONTAINERS):
                token = type(item)
            elif isinstance(item, torch.Tensor) and item.is_meta:
                token = _Unmade()
            elif isinstance(item, torch.Tensor) and id(item) not in registered:
                token = _Same(item, 0 if item.is_inference() else item._version)
            else:
                token = _Same(item)
            found[node.path, label] = token
    return found


def changes(before: Tokens, now: Tokens, ignored: Collection[Place] = ()) -> list[Place]:
    """Return the places of additions, removals and changes, except in or below `ignored`."""
    different = [p for p in {**before, **now} if p not in before or before[p] != now.get(p)]
    if not ignored or not different:
        return different
    paths = tuple(name_of(place) for place in ignored)
    return [
        p for p in different if not (f"{name_of(p)}.").startswith(tuple(f"{x}." for x in paths))
    ]


def name_of(place: Place) -> str:
    """Return a place's name, such as `blocks.0.scale`."""
    return f"{place[0]}{place[1]}".lstrip(".")


class Watch:
    """Remembers what the forward of `model` sees.

    `ignored` are places that forward itself changes. `asks_flags`: whether it reads requires_grad
    of tensors; only then it matters which parameters have it.
    """

    def __init__(
        self,
        model: nn.Module,
        runs_itself: Iterable[nn.Module],
        ignored: Collection[Place] = (),
        *,
        asks_flags: bool = False,
    ) -> None:
        self._model, self._ignored = weakref.ref(model), frozenset(ignored)
        self._was_training = model.training
        self._sight = Sight(runs_itself, named_only=True)
        nodes = self._sight.walk(model)
        self._tokens = tokens_of(model, nodes)
        self._mark(model, nodes)
        asked = list(model.named_parameters()) if asks_flags else []
        self._flags = [(name, weakref.ref(p), p.requires_grad) for name, p in asked]
        asked_modes = list(model.named_modules()) if "training" in self._sight.names else []
        # Modules that cells run themselves follow the cells' mode, others the model's.
        self._modes, self._run_modes = (
            [
                (path, weakref.ref(module), module.training is not model.training)
                for path, module in asked_modes
                if self._sight.skips(module) is runs_itself
            ]
            for runs_itself in (False, True)
        )
        self._for_all = _hooks_for_all()
        modules = [module for module in model.modules() if not self._sight.skips(module)]
        self._library = Library([node.value for node in nodes], modules)

    def changed(self, cells_train: bool | None = None) -> list[str]:
        """Return the names of what has changed; none if the model is gone.

        `cells_train` is the mode of the cells in a step, which that of the model must not leave.
        """
        model = self._model()
        if model is None:
            return []
        if cells_train is self._was_training is not model.training:
            now, before = ("train", "eval") if model.training else ("eval", "train")
            return [f"training (model.{now}(); call pipe.{now}() as well, or model.{before}())"]
        found = [*self._seen(model), *self._flagged(model), *self._library.changed()]
        if cells_train is not None and self._sight.asks_modes:
            found += _unlike(self._run_modes, cells_train)
        return found

    def _flagged(self, model: nn.Module) -> list[str]:
        """Return changed flags: of parameters, of frozen modules, of all modules."""
        found = ["the hooks of all modules"] if _hooks_for_all() != self._for_all else []
        for name, parameter, flag in self._flags:
            if (tensor := parameter()) is not None and tensor.requires_grad is not flag:
                found.append(f"{name}.requires_grad")
        return [*found, *(_unlike(self._modes, True) if model.training else ())]

    def _seen(self, model: nn.Module) -> list[str]:
        if self._is_same(model):
            return []
        nodes = self._sight.walk(model)
        tokens = tokens_of(model, nodes)
        found = changes(self._tokens, tokens, self._ignored)
        if not found:  # new but equal objects
            self._tokens = tokens
            self._mark(model, nodes)
        return [name_of(place) for place in found]

    def _mark(self, model: nn.Module, nodes: Iterable[Node]) -> None:
        """Remember the walk, to repeat it without paths and tokens."""
        registered = _registered(model)
        self._marks: list[tuple[int, int, list[object]]] = []
        self._plain: list[object] = []  # kept alive, so that their ids are not reused
        self._alive: list[weakref.ref[object]] = []
        self._versions: list[tuple[weakref.ref[torch.Tensor], int]] = []
        for node in nodes:
            values = [item for _, item in node.items]
            self._marks.append((node.parent, node.place, [*map(_mark, values)]))
            for value in values:
                if isinstance(value, PLAIN):
                    self._plain.append(value)
                elif isinstance(value, torch.Tensor):
                    if id(value) not in registered and not value.is_inference():
                        self._versions.append((weakref.ref(value), value._version))
                elif not isinstance(value, (*_CONTAINERS, Frozen)):
                    try:
                        self._alive.append(weakref.ref(value))
                    except TypeError:
                        continue

    def _is_same(self, model: nn.Module) -> bool:
        seen: list[list[object]] = []
        for parent, place, marks in self._marks:
            value = model if parent < 0 else seen[parent][place]
            values = [item for _, item in self._sight.items(value)]
            if [*map(_mark, values)] != marks:
                return False
            seen.append(values)
        for tensor, version in self._versions:
            found = tensor()
            if found is None or found._version != version:
                return False
        return all(reference() is not None for reference in self._alive)

    def __deepcopy__(self, memo: dict[int, object]) -> "Watch":
        return self  # it watches the original model


def _unlike(modes: Iterable[_Mode], training: bool) -> list[str]:
    """Return the modules that differ from `training`, or do so no longer."""
    return [
        f"{path}.training"
        for path, module, apart in modes
        if (found := module()) is not None and (found.training is not training) is not apart
    ]


def _mark(value: object) -> object:
    return value.data if type(value) is Frozen else id(value)
