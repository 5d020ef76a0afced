"""One call of the model's own forward, of which one cell's part really runs.

Blocks number the call's parts: part i goes from the call of block i to that of the next one; the
first begins with the call itself, the last ends with it. In the parts before its own, a cell is
told by `Event`s what everything computed from parameters, blocks or random numbers gave, as
tensors without values; what follows from the batch alone is computed anew. When all is told it
puts in the values that were handed on, and where the next cell's block is called it stops.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from stagewise.errors import CellError, ModelError
from stagewise.model.forward.users_code import place_of_frame, users_frame
from stagewise.model.replay.handover import (
    Crossing,
    Done,
    Event,
    Form,
    Given,
    Key,
    Label,
    Needs,
    Story,
    check_constant,
    flat,
)
from stagewise.model.replay.skeleton import Skeleton


@dataclass(eq=False)
class _Value:
    """A tensor that belongs to one part of the call: `here` is what the model's code holds."""

    here: torch.Tensor
    key: Key
    label: Label
    part: int
    real: torch.Tensor | None


class _Stop(BaseException):
    """Another cell goes on, that of `block`."""

    def __init__(self, block: int, arguments: list[object]) -> None:
        self.block, self.arguments = block, arguments


class Run(TorchFunctionMode):
    """One call of the skeleton; `cell` is the part that runs, None: all of it."""

    def __init__(
        self,
        skeleton: Skeleton,
        names: Sequence[str],
        cell: int | None,
        blocks: Mapping[int, nn.Module],
        state: Callable[[str], torch.Tensor | None],
        needs: Needs,
        arriving: Crossing | None = None,
    ) -> None:
        super().__init__()
        self._skeleton, self._names, self._cell = skeleton, names, cell
        self._blocks, self._state, self._needs, self._arriving = blocks, state, needs, arriving
        self._events = list(arriving.story.events) if arriving else []
        self._next = 0  # of the events that are told
        self._is_open = False
        self._part, self._last_block = 0, -1
        self._turns: Counter[tuple[int, str, str]] = Counter()
        self._values: dict[Key, _Value] = {}
        self._by_id: dict[int, _Value] = {}
        self._labels: dict[Key, Label] = {}
        if arriving is not None:
            story = arriving.story
            self._labels = dict(zip(story.keys, story.labels, strict=True))
        self._device, self._inputs = torch.device("cpu"), set[int]()

    @property
    def _is_last(self) -> bool:
        return (self._part if self._cell is None else self._cell) == len(self._names) - 1

    def _is_live(self) -> bool:
        """Whether what comes now really runs; the first time, what was handed on is put in."""
        if not self._is_open and self._next == len(self._events):
            self._is_open = True
            self._open()
        return self._is_open

    def run(self, inputs: Mapping[str, object], device: torch.device) -> object:
        """Call the model; returns its output from the last cell, else what crosses."""
        self._device = device
        self._inputs = {id(leaf) for leaf in pytree.tree_leaves(dict(inputs))}
        self._skeleton.block = self._called
        try:
            with self:
                output = self._skeleton.model(**inputs)
        except _Stop as stop:
            return self._crossing(stop)
        finally:
            self._skeleton.block = None
            self._skeleton.put_back()
        if not self._is_live():
            raise self._astray("the end of forward", self._line())
        if self._cell is None:
            self._part = len(self._names) - 1
        leaves, spec = flat(output)
        output = pytree.tree_unflatten([self._real(leaf, "the output") for leaf in leaves], spec)
        return output if self._is_last else Done(output)

    # A call of a block.

    def _called(self, index: int, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            return self._run_block(index, args, kwargs)
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def _run_block(self, index: int, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        name = self._names[index]
        if index <= self._last_block:
            again = (
                "again" if index == self._last_block else f"after {self._names[self._last_block]}"
            )
            raise CellError(
                f"the model called {name} {again} ({self._line()}), but cells run once and in one "
                "order, that of the example; name the module around them in cells"
            )
        self._last_block = index
        leaves, spec = flat((args, kwargs))
        if self._cell is not None and index > self._cell:
            raise _Stop(index, leaves)
        self._part = max(self._part, index)
        what = f"block {name}"
        if not self._is_live():
            return self._told(what, leaves)
        given = [self._real(leaf, f"an argument of {name}") for leaf in leaves]
        for leaf in given:
            if isinstance(leaf, torch.Tensor) and leaf.is_meta and not self._device.type == "meta":
                raise CellError(
                    f"an argument of {name} has no values: it was made outside of torch's own "
                    f"functions from what another cell computes; name the module that makes it in "
                    "cells"
                )
        args, kwargs = pytree.tree_unflatten(given, spec)
        return self._noted(what, self._blocks[index](*args, **kwargs), leaves, given)

    def _open(self) -> None:
        """Put in what the cell before has handed on."""
        if self._arriving is None:
            return
        story = self._arriving.story
        self._part = max(self._part, story.block)
        for key, tensor in zip(story.keys, self._arriving.tensors, strict=True):
            value = self._values[key]
            value.real = tensor
            self._by_id[id(tensor)] = value

    def _crossing(self, stop: _Stop) -> Crossing:
        arguments = set()
        for leaf in stop.arguments:
            if (value := self._value(leaf)) is not None:
                self._carried(value, f"an argument of {self._names[stop.block]}")
                arguments.add(id(value))
        there = [value for value in self._values.values() if value.real is not None]
        wanted = self._needs.wanted(stop.block, [value.label for value in there])
        values = [v for v in there if v.label in wanted or id(v) in arguments]
        return Crossing(
            Story(
                stop.block,
                tuple(self._events),
                tuple(value.key for value in values),
                tuple(value.label for value in values),
            ),
            [value.real for value in values if value.real is not None],
        )

    # A call of a function of torch.

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        name, touches = name_of(func), self._touches(args) or self._touches(kwargs.values())
        if not touches:
            if changes_first(name) and id(args[0]) in self._inputs:
                raise ModelError(
                    f"{self._line()} changes an input of the model in place ({name}); the cells "
                    "that take it would see different values: let it make a new tensor (x = x + 1 "
                    "in place of x += 1), or clone it first"
                )
            if name not in RANDOM:
                return func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if touches and name in QUERIES:
            return self._asked(func, name, leaves, spec)
        if touches and all(self._is_constant(leaf) for leaf in leaves if self._is_ours(leaf)):
            return _call(func, [self._real(leaf, name) for leaf in leaves], spec)
        if not self._is_live():
            return self._told(name, leaves)
        self._check_states(leaves)
        given = [self._real(leaf, name) for leaf in leaves]
        return self._noted(name, _call(func, given, spec), leaves, given)

    def _check_states(self, leaves: list[object]) -> None:
        """Stop where another cell goes on: one that holds a parameter, if its block is left out."""
        if self._cell is None:
            return
        for leaf in leaves:
            name = self._skeleton.states.get(id(leaf))
            if name is not None and id(leaf) not in self._by_id and self._state(name) is None:
                for later in range(self._cell + 1, len(self._names)):
                    if name in self._needs.states[later]:
                        raise _Stop(later, leaves)

    def _asked(
        self, func: Callable[..., Any], name: str, leaves: list[object], spec: pytree.TreeSpec
    ) -> object:
        if name in OF_DEVICE:
            asked = torch.empty((), device=self._device)
            leaves = [asked if self._is_ours(leaf) else leaf for leaf in leaves]
        else:
            values = ((leaf, self._value(leaf)) for leaf in leaves)
            leaves = [v.real if v is not None and v.real is not None else x for x, v in values]
        return _call(func, leaves, spec)

    def _noted(
        self, what: str, result: object, leaves: list[object], given: list[object]
    ) -> object:
        """Note what really ran; returns the result."""
        line = self._line()
        found, spec = flat(result)
        places = {id(leaf): i for i, leaf in reversed([*enumerate(given)]) if _is_tensor(leaf)}
        event, told = len(self._events), []
        self._turns[self._part, what, line] += 1
        turn = self._turns[self._part, what, line]
        for index, leaf in enumerate(found):
            if not isinstance(leaf, torch.Tensor):
                if isinstance(leaf, RemovableHandle):
                    leaf = None  # of a hook on a tensor, which is put on once
                if not self._is_last:
                    check_constant(leaf, f"{what} ({line})")
                told.append(leaf)
                continue
            if id(leaf) in places:
                told.append(Given(places[id(leaf)]))
            else:
                told.append(Form(leaf.shape, leaf.dtype, leaf.requires_grad))
            self._keep(leaf, Key(event, index), Label(self._part, what, line, turn, index), leaf)
        if changes_first(what) and not self._is_state(leaves[0]):
            self._keep(given[0], Key(event, -1), Label(self._part, what, line, turn, -1), given[0])
        self._events.append(Event(what, pytree.tree_unflatten(told, spec)))
        self._next = len(self._events)
        return result

    def _told(self, what: str, leaves: list[object]) -> object:
        """What ran in a cell before this one, without its values."""
        index = self._next
        if index >= len(self._events) or self._events[index].what != what:
            raise self._astray(what, self._line())
        self._next += 1
        found, spec = flat(self._events[index].result)
        results: list[object] = []
        for place, leaf in enumerate(found):
            if not isinstance(leaf, Form | Given):
                results.append(leaf)
                continue
            tensor = leaf.empty() if isinstance(leaf, Form) else leaves[leaf.place]
            if isinstance(tensor, torch.Tensor) and self._is_state(tensor):
                tensor = torch.empty_like(tensor)  # else the parameter would be a value
            self._keep(tensor, Key(index, place), self._label(Key(index, place), what))
            results.append(tensor)
        if changes_first(what) and not self._is_state(leaves[0]):
            self._keep(leaves[0], Key(index, -1), self._label(Key(index, -1), what))
        return pytree.tree_unflatten(results, spec)

    # The values that belong to one cell.

    def _keep(self, tensor: object, key: Key, label: Label, real: object = None) -> None:
        if not isinstance(tensor, torch.Tensor) or id(tensor) in self._by_id:
            return
        assert real is None or isinstance(real, torch.Tensor)
        if self._cell is None:
            self._needs.seen.add(label)
        self._values[key] = self._by_id[id(tensor)] = _Value(tensor, key, label, self._part, real)

    def _label(self, key: Key, what: str) -> Label:
        return self._labels.get(key) or Label(self._part, what, self._line(), 0, key.leaf)

    def _value(self, leaf: object) -> _Value | None:
        return self._by_id.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None

    def _is_ours(self, leaf: object) -> bool:
        return id(leaf) in self._by_id or id(leaf) in self._skeleton.states

    def _touches(self, values: Iterable[object]) -> bool:
        """Whether a tensor that belongs to one cell is among the values."""
        return any(
            self._touches(value) if isinstance(value, list | tuple) else self._is_ours(value)
            for value in values
        )

    def _is_state(self, leaf: object) -> bool:
        return id(leaf) in self._skeleton.states

    def _is_constant(self, leaf: object) -> bool:
        return self._skeleton.states.get(id(leaf)) in self._skeleton.constant

    def _carried(self, value: _Value, user: str) -> torch.Tensor:
        if value.real is None:
            raise CellError(
                f"{user} ({self._line()}) uses the result of {value.label}, which lies in another "
                "cell and is not carried here, since forward went another way in the example; give "
                "stagewise.plan an example that goes this way, or pass the value to the blocks "
                "between as an argument"
            )
        return value.real

    def _real(self, leaf: object, user: str) -> object:
        """The tensor itself, where `leaf` stands for one."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        value = self._by_id.get(id(leaf))
        if value is not None:
            real = self._carried(value, user)
            if self._cell is None:
                for boundary in range(value.part + 1, self._part + 1):
                    self._needs.across[boundary].add(value.label)
            return real
        name = self._skeleton.states.get(id(leaf))
        if name is None:
            return leaf
        state = self._state(name)
        if state is None:
            raise CellError(
                f"{user} ({self._line()}) uses {name}, which this cell does not hold, since "
                "forward did not use it here in the example; give stagewise.plan an example that "
                "goes this way, or name the module that uses it in cells"
            )
        if self._cell is None:
            self._needs.states[self._part].add(name)
        return state

    def _astray(self, what: str, line: str) -> CellError:
        told = self._events[self._next].what if self._next < len(self._events) else "its block"
        return CellError(
            f"forward ran {what} ({line}) where it ran {told} in the cell before; outside of the "
            "blocks that cells= names it must do the same each time it is given the same, "
            "so draw random numbers by torch, and keep no count in attributes"
        )

    @staticmethod
    def _line() -> str:
        """The model's own line that is running."""
        return place_of_frame(users_frame(sys._getframe(1)))


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _call(func: Callable[..., Any], leaves: Sequence[object], spec: pytree.TreeSpec) -> Any:
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return func(*args, **kwargs)


_QUERIES = """shape dtype device ndim size dim numel stride layout is_floating_point is_complex
is_signed requires_grad is_contiguous __len__ __hash__ nelement ndimension element_size itemsize
nbytes is_leaf is_sparse is_quantized is_nested is_cuda is_cpu is_meta is_mps is_xpu get_device
names is_inference is_same_size output_nr grad_fn"""


_OF_DEVICE = "device is_cuda is_cpu is_meta is_mps is_xpu get_device"


_RANDOM = """rand randn randint randperm rand_like randn_like randint_like normal bernoulli
multinomial poisson dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_
feature_dropout feature_alpha_dropout rrelu rrelu_ gumbel_softmax native_dropout uniform_ normal_
bernoulli_ random_ exponential_ geometric_ cauchy_ log_normal_ trunc_normal_ fractional_max_pool2d
fractional_max_pool3d"""


QUERIES = frozenset(_QUERIES.split())  # a tensor without values answers these


OF_DEVICE = frozenset(_OF_DEVICE.split())  # ... where these are those of the cell's device


RANDOM = frozenset(_RANDOM.split())  # these may draw from the default generators


def name_of(func: Callable[..., Any]) -> str:
    """A function's name, or a property's."""
    name: str = getattr(func, "__name__", type(func).__name__)
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # type: ignore[attr-defined]


def changes_first(name: str) -> bool:
    """Whether a function of this name changes its first argument in place."""
    special = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return special or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
