"""One call of the model's own forward, of which one cell's part really runs.

Blocks number the call's parts: part i goes from the call of block i to that of the next one; the
first begins with the call itself, the last ends with it. In the parts before its own, a cell is
told by `Event`s what everything computed from parameters, blocks or random numbers gave, as
tensors without values; what follows from the batch alone is computed anew. When all is told it
puts in the values that were handed on, and where the next cell's block is called it stops.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from stagewise.errors import CellError, ModelError
from stagewise.model.replay.handover import (
    Event,
    EventId,
    Handover,
    Ledger,
    Provided,
    Required,
    ResultRef,
    Returned,
    TensorForm,
    check_constant,
    flat_leaves,
)
from stagewise.model.replay.part_values import Values, line_running
from stagewise.model.replay.skeleton import Skeleton
from stagewise.model.replay.torch_functions import (
    OF_DEVICE,
    QUERIES,
    RANDOM,
    changes_first,
    function_name,
)


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
        needs: Required,
        arriving: Handover | None = None,
    ) -> None:
        super().__init__()
        self._skeleton, self._names, self._cell = skeleton, names, cell
        self._blocks, self._state, self._needs, self._arriving = blocks, state, needs, arriving
        self._events = list(arriving.story.events) if arriving else []
        self._next = 0  # of the events that are told
        self._is_open = False
        self._last_block = -1
        self._turns: Counter[tuple[int, str, str]] = Counter()
        story = arriving.story if arriving else None
        labels = dict(zip(story.keys, story.labels, strict=True)) if story else {}
        self._own = Values(skeleton, state, needs, labels, learns=cell is None)
        self._device, self._inputs = torch.device("cpu"), set[int]()

    @property
    def _is_last(self) -> bool:
        return (self._own.part if self._cell is None else self._cell) == len(self._names) - 1

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
            raise self._astray("the end of forward", line_running())
        if self._cell is None:
            self._own.part = len(self._names) - 1
        leaves, spec = flat_leaves(output)
        output = pytree.tree_unflatten(
            [self._own.real(leaf, "the output") for leaf in leaves], spec
        )
        return output if self._is_last else Returned(output)

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
                f"the model called {name} {again} ({line_running()}), but cells run once and in "
                "one order, that of the example; name the module around them in cells"
            )
        self._last_block = index
        leaves, spec = flat_leaves((args, kwargs))
        if self._cell is not None and index > self._cell:
            raise _Stop(index, leaves)
        self._own.part = max(self._own.part, index)
        what = f"block {name}"
        if not self._is_live():
            return self._told(what, leaves)
        given = [self._own.real(leaf, f"an argument of {name}") for leaf in leaves]
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
        self._own.part = max(self._own.part, story.block)
        for key, tensor in zip(story.keys, self._arriving.tensors, strict=True):
            self._own.arrived(key, tensor)

    def _crossing(self, stop: _Stop) -> Handover:
        arguments = set()
        for leaf in stop.arguments:
            if (value := self._own.of(leaf)) is not None:
                self._own.carried(value, f"an argument of {self._names[stop.block]}")
                arguments.add(id(value))
        there = [value for value in self._own.by_key.values() if value.real is not None]
        wanted = self._needs.wanted(stop.block, [value.label for value in there])
        values = [v for v in there if v.label in wanted or id(v) in arguments]
        return Handover(
            Ledger(
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
        name, touches = (
            function_name(func),
            self._own.touches(args) or self._own.touches(kwargs.values()),
        )
        if not touches:
            if changes_first(name) and id(args[0]) in self._inputs:
                raise ModelError(
                    f"{line_running()} changes an input of the model in place ({name}); the cells "
                    "that take it would see different values: let it make a new tensor (x = x + 1 "
                    "in place of x += 1), or clone it first"
                )
            if name not in RANDOM:
                return func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if touches and name in QUERIES:
            return self._asked(func, name, leaves, spec)
        if touches and all(
            self._own.is_constant(leaf) for leaf in leaves if self._own.is_ours(leaf)
        ):
            return _call(func, [self._own.real(leaf, name) for leaf in leaves], spec)
        if not self._is_live():
            return self._told(name, leaves)
        self._check_states(leaves)
        given = [self._own.real(leaf, name) for leaf in leaves]
        return self._noted(name, _call(func, given, spec), leaves, given)

    def _check_states(self, leaves: list[object]) -> None:
        """Stop where another cell goes on: one that holds a parameter, if its block is left out."""
        if self._cell is None:
            return
        for leaf in leaves:
            name = self._skeleton.states.get(id(leaf))
            if name is not None and self._own.of(leaf) is None and self._state(name) is None:
                for later in range(self._cell + 1, len(self._names)):
                    if name in self._needs.states[later]:
                        raise _Stop(later, leaves)

    def _asked(
        self, func: Callable[..., Any], name: str, leaves: list[object], spec: pytree.TreeSpec
    ) -> object:
        if name in OF_DEVICE:
            asked = torch.empty((), device=self._device)
            leaves = [asked if self._own.is_ours(leaf) else leaf for leaf in leaves]
        else:
            values = ((leaf, self._own.of(leaf)) for leaf in leaves)
            leaves = [v.real if v is not None and v.real is not None else x for x, v in values]
        return _call(func, leaves, spec)

    def _noted(
        self, what: str, result: object, leaves: list[object], given: list[object]
    ) -> object:
        """Note what really ran; returns the result."""
        line = line_running()
        found, spec = flat_leaves(result)
        tensors = [(i, leaf) for i, leaf in enumerate(given) if isinstance(leaf, torch.Tensor)]
        places = {id(leaf): i for i, leaf in reversed(tensors)}
        event, told = len(self._events), []
        place = (self._own.part, what, line)
        self._turns[place] += 1
        turn = self._turns[place]
        for index, leaf in enumerate(found):
            if not isinstance(leaf, torch.Tensor):
                if isinstance(leaf, RemovableHandle):
                    leaf = None  # of a hook on a tensor, which is put on once
                if not self._is_last:
                    check_constant(leaf, f"{what} ({line})")
                told.append(leaf)
                continue
            if id(leaf) in places:
                told.append(Provided(places[id(leaf)]))
            else:
                told.append(TensorForm(leaf.shape, leaf.dtype, leaf.requires_grad))
            self._own.keep(leaf, ResultRef(event, index), EventId(*place, turn, index), leaf)
        if changes_first(what) and not self._own.is_state(leaves[0]):
            self._own.keep(given[0], ResultRef(event, -1), EventId(*place, turn, -1), given[0])
        self._events.append(Event(what, pytree.tree_unflatten(told, spec)))
        self._next = len(self._events)
        return result

    def _told(self, what: str, leaves: list[object]) -> object:
        """What ran in a cell before this one, without its values."""
        index = self._next
        if index >= len(self._events) or self._events[index].what != what:
            raise self._astray(what, line_running())
        self._next += 1
        found, spec = flat_leaves(self._events[index].result)
        results: list[object] = []
        for place, leaf in enumerate(found):
            if not isinstance(leaf, TensorForm | Provided):
                results.append(leaf)
                continue
            tensor = leaf.empty() if isinstance(leaf, TensorForm) else leaves[leaf.place]
            if isinstance(tensor, torch.Tensor) and self._own.is_state(tensor):
                tensor = torch.empty_like(tensor)  # else the parameter would be a value
            self._own.told(tensor, ResultRef(index, place), what)
            results.append(tensor)
        if changes_first(what) and not self._own.is_state(leaves[0]):
            self._own.told(leaves[0], ResultRef(index, -1), what)
        return pytree.tree_unflatten(results, spec)

    def _astray(self, what: str, line: str) -> CellError:
        told = self._events[self._next].what if self._next < len(self._events) else "its block"
        return CellError(
            f"forward ran {what} ({line}) where it ran {told} in the cell before; outside of the "
            "blocks that cells= names it must do the same each time it is given the same, "
            "so draw random numbers by torch, and keep no count in attributes"
        )


def _call(func: Callable[..., Any], leaves: Sequence[object], spec: pytree.TreeSpec) -> Any:
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return func(*args, **kwargs)
