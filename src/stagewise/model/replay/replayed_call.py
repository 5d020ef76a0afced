"""One call of the model's own forward, in which only the parts of one cell, or several, really run.

The blocks divide the call into parts: part i lasts from the call of block i to that of the next
one; the first begins with the call itself, the last ends with it. In the parts before its own, a
cell replays `Event`s: everything computed from parameters, blocks or random numbers yields tensors
without values; what depends only on the batch is computed again. After the last event it inserts
the values that were passed on, and it stops where the next cell's block is called.
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
    called,
    changes_first,
    function_name,
)


class _Stop(BaseException):
    """Stops this cell's run: the cell of `block` continues."""

    def __init__(self, block: int, arguments: list[object]) -> None:
        self.block, self.arguments = block, arguments


class Run(TorchFunctionMode):
    """One call of the skeleton; `cells` are the parts that run (None: all), each entered before."""

    def __init__(
        self,
        skeleton: Skeleton,
        names: Sequence[str],
        cells: range | None,
        blocks: Mapping[int, nn.Module],
        state: Callable[[str], torch.Tensor | None],
        required: Required,
        arriving: Handover | None = None,
    ) -> None:
        super().__init__()
        self._skeleton, self._names, self._cells = skeleton, names, cells
        self.enter: Callable[[int], object] = lambda index: None
        self._blocks, self._state, self._arriving = blocks, state, arriving
        self._required = required
        self._events = list(arriving.ledger.events) if arriving else []
        self._next = 0  # index of the next event to replay
        self._is_open = False
        self._last_block = -1
        self._turns: Counter[tuple[int, str, str]] = Counter()
        ledger = arriving.ledger if arriving else None
        ids = dict(zip(ledger.refs, ledger.ids, strict=True)) if ledger else {}
        self._own = Values(skeleton, state, required, ids, learns=cells is None)
        self._device, self._inputs = torch.device("cpu"), set[int]()

    @property
    def _is_last(self) -> bool:
        last = self._own.part if self._cells is None else self._cells[-1]
        return last == len(self._names) - 1

    def _is_live(self) -> bool:
        """Return whether code now really runs; the first time, insert the values passed on."""
        if not self._is_open and self._next == len(self._events):
            self._is_open = True
            self._open()
        return self._is_open

    def run(self, inputs: Mapping[str, object], device: torch.device) -> object:
        """Call the model; return its output in the last cell, else the handover."""
        self._device = device
        self._inputs = {id(leaf) for leaf in pytree.tree_leaves(dict(inputs))}
        self._skeleton.block = self._called
        try:
            with self:
                output = self._skeleton.model(**inputs)
        except _Stop as stop:
            return self._handover(stop)
        finally:
            self._skeleton.block = None
            self._skeleton.put_back()
        if not self._is_live():
            raise self._diverged("the end of forward", line_running())
        if self._cells is None:
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
                f"the model called {name} {again} ({line_running()}), but cells run once, in the "
                "example's order; name the module around them in cells"
            )
        self._last_block = index
        leaves, spec = flat_leaves((args, kwargs))
        if self._cells is not None and index > self._cells[-1]:
            raise _Stop(index, leaves)
        self._own.part = max(self._own.part, index)
        what = f"block {name}"
        if not self._is_live():
            return self._replayed(what, leaves)
        given = [self._own.real(leaf, f"an argument of {name}") for leaf in leaves]
        for leaf in given:
            if isinstance(leaf, torch.Tensor) and leaf.is_meta and not self._device.type == "meta":
                raise CellError(
                    f"an argument of {name} has no values: it was not made by torch's own "
                    "functions, from values of another cell; name the module that makes it in "
                    "cells"
                )
        self.enter(index)
        args, kwargs = pytree.tree_unflatten(given, spec)
        return self._recorded(what, self._blocks[index](*args, **kwargs), leaves, given)

    def _open(self) -> None:
        """Insert the values that the previous cell passed on."""
        if self._arriving is None:
            return
        ledger = self._arriving.ledger
        self._own.part = max(self._own.part, ledger.block)
        for ref, tensor in zip(ledger.refs, self._arriving.tensors, strict=True):
            self._own.arrived(ref, tensor)

    def _handover(self, stop: _Stop) -> Handover:
        arguments = set()
        for leaf in stop.arguments:
            if (value := self._own.value_of(leaf)) is not None:
                self._own.carried(value, f"an argument of {self._names[stop.block]}")
                arguments.add(id(value))
        there = [value for value in self._own.by_ref.values() if value.real is not None]
        wanted = self._required.wanted(stop.block, [value.event for value in there])
        values = [v for v in there if v.event in wanted or id(v) in arguments]
        return Handover(
            Ledger(
                stop.block,
                tuple(self._events),
                tuple(value.ref for value in values),
                tuple(value.event for value in values),
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
                    "that take it would see different values: create a new tensor (x = x + 1 "
                    "instead of x += 1), or clone it first"
                )
            if name not in RANDOM:
                return func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if touches and name in QUERIES:
            return self._query(func, name, leaves, spec)
        if touches and all(
            self._own.is_constant(leaf) for leaf in leaves if self._own.is_ours(leaf)
        ):
            return called(func, [self._own.real(leaf, name) for leaf in leaves], spec)
        if not self._is_live():
            return self._replayed(name, leaves)
        self._check_states(leaves)
        given = [self._own.real(leaf, name) for leaf in leaves]
        return self._recorded(name, called(func, given, spec), leaves, given)

    def _check_states(self, leaves: list[object]) -> None:
        """Stop if a later cell holds a parameter used here, since its block was skipped."""
        if self._cells is None:
            return
        for leaf in leaves:
            name = self._skeleton.states.get(id(leaf))
            if name is not None and self._own.value_of(leaf) is None and self._state(name) is None:
                for later in range(self._cells[-1] + 1, len(self._names)):
                    if name in self._required.states[later]:
                        raise _Stop(later, leaves)

    def _query(
        self, func: Callable[..., Any], name: str, leaves: list[object], spec: pytree.TreeSpec
    ) -> object:
        if name in OF_DEVICE:
            asked = torch.empty((), device=self._device)
            leaves = [asked if self._own.is_ours(leaf) else leaf for leaf in leaves]
        else:
            values = ((leaf, self._own.value_of(leaf)) for leaf in leaves)
            leaves = [v.real if v is not None and v.real is not None else x for x, v in values]
        return called(func, leaves, spec)

    def _recorded(
        self, what: str, result: object, leaves: list[object], given: list[object]
    ) -> object:
        """Record a call that really ran as an event; return its result."""
        line = line_running()
        found, spec = flat_leaves(result)
        tensors = [(i, leaf) for i, leaf in enumerate(given) if isinstance(leaf, torch.Tensor)]
        places = {id(leaf): i for i, leaf in reversed(tensors)}
        event, forms = len(self._events), []
        place = (self._own.part, what, line)
        self._turns[place] += 1
        turn = self._turns[place]
        for index, leaf in enumerate(found):
            if not isinstance(leaf, torch.Tensor):
                if isinstance(leaf, RemovableHandle):
                    leaf = None  # of a hook on a tensor, which is registered once
                if not self._is_last:
                    check_constant(leaf, f"{what} ({line})")
                forms.append(leaf)
                continue
            if id(leaf) in places:
                forms.append(Provided(places[id(leaf)]))
            else:
                forms.append(TensorForm(leaf.shape, leaf.dtype, leaf.requires_grad))
            self._own.keep(leaf, ResultRef(event, index), EventId(*place, turn, index), leaf)
        if changes_first(what) and not self._own.is_state(leaves[0]):
            self._own.keep(given[0], ResultRef(event, -1), EventId(*place, turn, -1), given[0])
        self._events.append(Event(what, pytree.tree_unflatten(forms, spec)))
        self._next = len(self._events)
        return result

    def _replayed(self, what: str, leaves: list[object]) -> object:
        """Return the result of a call that ran in an earlier cell, without values."""
        index = self._next
        if index >= len(self._events) or self._events[index].what != what:
            raise self._diverged(what, line_running())
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
            self._own.keep_stand_in(tensor, ResultRef(index, place), what)
            results.append(tensor)
        if changes_first(what) and not self._own.is_state(leaves[0]):
            self._own.keep_stand_in(leaves[0], ResultRef(index, -1), what)
        return pytree.tree_unflatten(results, spec)

    def _diverged(self, what: str, line: str) -> CellError:
        before = self._events[self._next].what if self._next < len(self._events) else "its block"
        return CellError(
            f"forward ran {what} ({line}) where it ran {before} in the previous cell; outside the "
            "blocks that cells= names, it must do the same for the same inputs: draw random "
            "numbers with torch, and keep no counters in attributes"
        )
