"""Skip connections: which message carries which skip, and a stage whose cells stash and pop.

A skip within a stage stays in the stage's graph. Between neighbours it travels with the boundary's
value; over a longer distance it has its own message, straight from stage to stage, and its gradient
returns the same way. To the stage it is one more input, or one more output.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.values import Apart, optionals, put_together, shared, take_apart
from stagewise.engine.stage.keywords import invoke
from stagewise.engine.stage.loss import Loss
from stagewise.engine.stage.stage import Action, Stage
from stagewise.engine.stage.work import Work
from stagewise.errors import CellError
from stagewise.model.cell import Cell, Chain
from stagewise.model.skip import Frame, Stashed, running
from stagewise.model.skip_pairs import Skip
from stagewise.schedule import Instruction, Kind

Cargo = tuple[tuple[Skip, ...], ...]  # per message of an instruction, in the order of `lower`


class SkipRoutes:
    """Where the skips of `chain` travel if it is cut by `balance`; keeps no reference to cells."""

    def __init__(self, chain: Chain, balance: Sequence[int]) -> None:
        self._skips = [cell.skips for cell in chain]
        self.cut(balance)

    def cut(self, balance: Sequence[int]) -> None:
        """Cut the chain by `balance` from now on."""
        stage_of = [stage for stage, size in enumerate(balance) for _ in range(size)]
        self._last = len(balance) - 1
        pairs = list(zip(stage_of, self._skips, strict=True))
        source = {skip: stage for stage, skips in pairs for skip in skips.stashes}
        self._between: dict[tuple[int, int], tuple[Skip, ...]] = {}
        for stage, skips in pairs:
            for skip in skips.pops:
                pair = source[skip], stage
                if pair[0] != pair[1]:
                    self._between[pair] = (*self._between.get(pair, ()), skip)

    @property
    def flows(self) -> tuple[tuple[int, int], ...]:
        """The (source, destination) pairs of non-adjacent stages that exchange messages."""
        return tuple(sorted(pair for pair in self._between if pair[1] - pair[0] > 1))

    def stage(
        self, index: int, cells: Chain, device: torch.device, *, is_last: bool, loss: Loss | None
    ) -> Stage:
        """Build the stage of `cells`, able to stash and pop if any is inside a SkipScope.

        Even if no skip crosses a cell: a cell must be able to pop what it stashed itself.
        """
        if not any(cell.skips.scopes for cell in cells):
            return Stage(index, cells, device, is_last=is_last, loss=loss)
        before, after = range(index - 1, -1, -1), range(index + 1, self._last + 1)
        return SkipStage(
            index,
            cells,
            device,
            is_last=is_last,
            loss=loss,
            arriving=self._cargo([(source, index) for source in before]),
            leaving=self._cargo([(index, destination) for destination in after]),
        )

    def _cargo(self, pairs: Sequence[tuple[int, int]]) -> Cargo:
        """Return the skips that travel with the neighbour's value, then those of each message."""
        near = self._between.get(pairs[0], ()) if pairs else ()
        return near, *(self._between[pair] for pair in pairs[1:] if pair in self._between)


@dataclass
class _Journey:
    """A microbatch on its way from cell to cell; a pytree, which looks copy and compare."""

    value: object
    frames: dict[str, Frame]  # keyed by the scope's path

    def onward(self) -> "_Journey":
        """Itself for one more cell; that which the cell was given stays, to run it again."""
        frames = {
            path: Frame(frame.own_names, dict(frame.stashed)) for path, frame in self.frames.items()
        }
        return _Journey(self.value, frames)

    def stashed(self) -> set[Skip]:
        return {Skip(path, name) for path, frame in self.frames.items() for name in frame.stashed}


class _Visits:
    """Runs the cells of one pass; separate, since the stage would otherwise refer to itself."""

    def __init__(self, cells: Chain, arriving: Cargo, leaving: Cargo) -> None:
        self._cells, self._arriving, self._leaving = cells, arriving, leaving
        self._scopes = {scope for cell in cells for scope in cell.skips.scopes}

    def run(self, cell: Cell, value: object, keywords: Mapping[str, object]) -> object:
        """Run one cell; the first unpacks the arriving skips, the last packs the leaving ones."""
        if cell.index == self._cells[0].index:
            journey = self._unpack(value)
        else:
            assert isinstance(value, _Journey)
            journey = value.onward()
        before, value = journey.stashed(), journey.value
        with running(tuple(journey.frames[scope.path] for scope in cell.skips.scopes)):
            journey.value = invoke(cell.module, journey.value, keywords)
        _check(cell, before, journey.stashed())
        for path, frame in journey.frames.items():
            for popped in frame.popped:
                if Skip(path, popped.name) in cell.skips.pops:
                    _check_owned(popped, value, journey)
            frame.popped.clear()
        for skip in cell.skips.stashes:
            _branch(journey.frames[skip.scope], skip.name)
        return journey if cell.index != self._cells[-1].index else self._pack(journey)

    def _unpack(self, value: object) -> _Journey:
        journey = _Journey(value, {scope.path: Frame(scope.own_names) for scope in self._scopes})
        first, *others = _several(value) if len(self._arriving) > 1 else (value,)
        journey.value, *near = _several(first) if self._arriving[0] else (first,)
        skips = itertools.chain.from_iterable(self._arriving)
        parts = itertools.chain(near, *map(_several, others))
        for skip, part in zip(skips, parts, strict=True):
            journey.frames[skip.scope].stashed[skip.name] = Stashed(skip.name, part)
        return journey

    def _pack(self, journey: _Journey) -> object:
        near, *others = (
            tuple(journey.frames[skip.scope].stashed[skip.name].unchanged() for skip in skips)
            for skips in self._leaving
        )
        first = (journey.value, *near) if near else journey.value
        return (first, *others) if others else first


class SkipStage(Stage):
    """A stage whose cells stash and pop."""

    def __init__(
        self,
        index: int,
        cells: Chain,
        device: torch.device,
        *,
        is_last: bool,
        loss: Loss | None,
        arriving: Cargo,
        leaving: Cargo,
    ) -> None:
        super().__init__(index, cells, device, is_last=is_last, loss=loss)
        visits = _Visits(cells, arriving, leaving)
        self._run_cell = visits.run
        self._calls = [(cell, partial(visits.run, cell)) for cell in cells]
        self._calls_modules = False
        self._arrive_apart, self._leave_apart = len(arriving) > 1, len(leaving) > 1
        self._num_inputs: dict[int, list[int]] = {}  # microbatch -> number of tensors per message

    def action(self, instruction: Instruction) -> Action:
        """Like `Stage.action`, with one value per message where there are several."""
        run = super().action(instruction)
        several = self._forward if instruction.kind is Kind.FORWARD else self._backward
        return partial(several, instruction.microbatch, run)

    def _forward(self, m: int, run: Action, received: list[Apart], work: Work) -> object:
        if self._arrive_apart:
            self._num_inputs[m] = [len(tensors) for tensors, _ in received]
            received = [take_apart(tuple(put_together(*apart) for apart in received))]
        sent = run(received, work)
        if not self._leave_apart:
            return sent
        return list(map(take_apart, _several(put_together(*sent))))

    def _backward(self, m: int, run: Action, received: list[Apart], work: Work) -> object:
        if len(received) > 1:
            gradients = itertools.chain.from_iterable(map(optionals, received))
            received = [take_apart(tuple(gradients))]
        sent = run(received, work)
        if not self._arrive_apart or sent is None:
            return sent
        rest = iter(optionals(sent))
        return [take_apart(tuple(itertools.islice(rest, n))) for n in self._num_inputs.pop(m)]

    def clear(self) -> None:
        self._num_inputs.clear()
        super().clear()


def _parts_of(journey: _Journey) -> tuple[list[object], dict[str, frozenset[str] | None]]:
    frames = journey.frames.items()
    stashed = {path: {n: s.value for n, s in frame.stashed.items()} for path, frame in frames}
    return [journey.value, stashed], {path: frame.own_names for path, frame in frames}


def _journey_of(parts: Iterable[Any], own_names: Any) -> _Journey:
    value, stashed = parts
    frames = {
        path: Frame(names, {name: Stashed(name, v) for name, v in stashed[path].items()})
        for path, names in own_names.items()
    }
    return _Journey(value, frames)


pytree.register_pytree_node(_Journey, _parts_of, _journey_of)


def _several(value: object) -> tuple[object, ...]:
    assert isinstance(value, tuple)
    return value


def _branch(frame: Frame, name: str) -> None:
    """Give a stashed value its own autograd nodes.

    So the gradients of its users are summed before they join those of the cell's output, whether
    they arrive through the graph or in a message.
    """
    tensors, structure = take_apart(frame.stashed[name].unchanged())
    value = put_together([tensor[...] for tensor in tensors], structure)
    frame.stashed[name] = Stashed(name, value)


def _check_owned(popped: Stashed, value: object, journey: _Journey) -> None:
    """Raise CellError if the popping cell's in-place change reaches other values as well."""
    changed = popped.changed()
    if not changed:
        return
    others = [
        value,
        *(s.value for frame in journey.frames.values() for s in frame.stashed.values()),
    ]
    tensors = [*changed, *itertools.chain.from_iterable(take_apart(v)[0] for v in others)]
    if any(shared(tensors)[: len(changed)]):
        popped.unchanged("by the cell that popped it; change a clone of it")


def _check(cell: Cell, before: set[Skip], after: set[Skip]) -> None:
    """Raise CellError unless the cell stashed and popped what it declares."""
    stashes, pops = set(cell.skips.stashes), set(cell.skips.pops)
    for what, skips, remedy in (
        ("declares that it stashes", stashes - after, "stash it in every forward (None will do)"),
        ("declares that it pops", pops & after, "pop it in every forward"),
        ("stashes", after - before - stashes, "declare it with @skippable(stash=[...])"),
        ("pops", before - after - pops, "declare it with @skippable(pop=[...])"),
    ):
        if skips:
            names = ", ".join(sorted(map(str, skips)))
            but = "but did not" if what.startswith("declares") else "without declaring it"
            raise CellError(f"{cell.in_words} {what} {names} {but}; {remedy}")
