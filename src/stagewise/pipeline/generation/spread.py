"""A model whose forward every rank runs, and in which each computes its own units.

Problem: a layer's input is on the rank that computed the layer before. Idea: all ranks run the same
Python code, so all know at every layer where the values are (`at`), and which rank is next: one
gives, the other takes. What a rank does not compute has the right shape and is NaN, so that a model
which mixes values outside its layers is found out. Which arguments must travel, and what a layer
returns, the ranks compare once.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Cache, EncoderDecoderCache

from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError
from stagewise.pipeline.generation.bare_model import filled
from stagewise.pipeline.generation.shared_units import (
    Agreed,
    Form,
    Function,
    Stack,
    Unit,
    units_of,
)

_WHAT = "generate"
_DIMS = 8

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a unit


class SpreadModel:
    """A model's units over `ranks`; `own` are this rank's tensors by name.

    What the ranks find out about calls of units is added to `agreed`, for the next time.
    """

    def __init__(
        self, model: Any, ranks: Ranks, own: Mapping[str, torch.Tensor], agreed: Agreed
    ) -> None:
        self._model, self._ranks, self._agreed = model, ranks, agreed
        self._stacks, self._units = units_of(model)
        self.at: int | None = None  # the rank that has the values; None: all do
        self._stack: Stack | None = None  # whose forward is running
        self.has_moved = False  # whether values have left a rank, or were waited for
        held = ranks.gather(sorted(own), _WHAT)
        self._holders: dict[str, list[int]] = {}
        for rank, names in enumerate(held):
            for name in names:
                self._holders.setdefault(name, []).append(rank)
        self._own = {**own, **self._lent(own)}
        floating = [t.dtype for t in own.values() if t.is_floating_point()]
        self._dtype = floating[0] if floating else torch.get_default_dtype()
        encoder = model.get_encoder() if model.config.is_encoder_decoder else None
        self._encoder = next((s for s in self._stacks if s.around is encoder), None)
        self._decoding = sorted(
            {s.owners[0] for stack in self._stacks if stack is not self._encoder
             for s in stack.blocks}
        )  # fmt: skip

    def flows_forward(self) -> bool:
        """Return whether no rank gives values to one before it."""
        way = [block.owners[0] for stack in self._stacks for block in stack.blocks]
        return all(before <= after for before, after in pairwise(way))

    def _lent(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Say who owns each unit; bring together what several ranks have a part of."""
        needed: dict[str, set[int]] = {}
        for unit in list(self._units):
            holders = [set(self._holders.get(name, ())) for name in unit.names()]
            if not all(holders):  # of no cell, so the model does not use it
                self._units.remove(unit)
                continue
            unit.owners = sorted(set.intersection(*holders))
            if not unit.owners:
                unit.owners = [min(map(min, holders))]
                for name in unit.names():
                    needed.setdefault(name, set()).add(unit.owners[0])
        for name, _ in self._model.named_buffers():
            if name in self._holders:
                needed.setdefault(name, set()).update(range(self._ranks.num_ranks))
        lent = {}
        for name, takers in needed.items():
            sources = self._holders[name]
            if takers := takers - set(sources):
                value = self._ranks.broadcast(own.get(name), sources[0], sorted(takers))
                if self._ranks.rank in takers:
                    assert value is not None
                    lent[name] = value
        return lent

    @contextmanager
    def run(self) -> Iterator[None]:
        """Let the model's forward be this rank's part of it."""
        replaced: list[tuple[nn.Module, Function]] = []
        for unit in self._units:
            replaced.append((unit.module, self._shared(unit, unit.module.forward)))
        for stack in self._stacks:
            replaced.append((stack.around, self._entered(stack, stack.around.forward)))
        before = [(module, module.__dict__.get("forward")) for module, _ in replaced]
        for module, forward in replaced:
            module.__dict__["forward"] = forward
        try:
            with filled(self._model, self._own):
                yield
        finally:
            for module, forward in before:  # type: ignore[assignment]
                module.__dict__.pop("forward")
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _entered(self, stack: Stack, forward: Function) -> Function:
        """Return the forward of the module around a stack, which all ranks' inputs are for."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.at, self._stack = None, stack
            output = forward(*args, **kwargs)
            self._stack = None
            if stack is self._encoder:
                self._hand_out(output)
                self.at = None
            return output

        return run

    def _hand_out(self, output: Any) -> None:
        """Give an encoder's output to the ranks that decode."""
        hidden, source = output.last_hidden_state, self.at
        assert source is not None
        if self._ranks.rank == source:
            for rank in self._decoding:
                if rank != source:
                    self._ranks.send(rank, [hidden.contiguous()])
        elif self._ranks.rank in self._decoding:
            output.last_hidden_state = self._ranks.receive(source, [_room(hidden)])[0]

    def _shared(self, unit: Unit, forward: Function) -> Function:
        def run(*args: Any, **kwargs: Any) -> Any:
            given = *args, *kwargs.values()
            hidden = next(value for value in given if isinstance(value, torch.Tensor))
            owner = self._owner(unit)
            if self.at not in (None, owner):
                self.has_moved = True
                args, kwargs = self._moved(unit, (args, kwargs), hidden, owner)
            output = forward(*args, **kwargs) if self._ranks.rank == owner else None
            if unit.stack is not None:
                call = unit.path, len(args), *kwargs
                output = self._as_block(unit, call, given, hidden, output, owner)
            elif output is None:
                output = unit.stand_in(hidden, self._dtype)
            self.at = owner
            return self._at_stack(output) if not hidden.is_floating_point() else output

        return run

    def _owner(self, unit: Unit) -> int:
        """Return who computes a unit: where the values are, if that rank can."""
        at = self.at
        if at is None and self._stack is not None:
            at = self._stack.blocks[0].owners[0]
        if at in unit.owners or at is None:
            return at if at is not None else unit.owners[0]
        return next((rank for rank in unit.owners if rank > at), unit.owners[-1])

    def _at_stack(self, embedded: torch.Tensor) -> torch.Tensor:
        """Take an embedding to where the first block is, since others may be added to it there."""
        if self._stack is None:
            return embedded
        source, target = self.at, self._stack.blocks[0].owners[0]
        self.has_moved |= source != target
        if source != target and self._ranks.rank == source:
            self._ranks.send(target, [embedded.contiguous()])
        elif source != target and self._ranks.rank == target:
            assert source is not None
            (embedded,) = self._ranks.receive(source, [_room(embedded)])
        self.at = target
        return embedded

    def _moved(self, unit: Unit, call: Call, hidden: torch.Tensor, owner: int) -> Call:
        """Take a call's values from where they are to its owner."""
        source, rank = self.at, self._ranks.rank
        assert source is not None
        leaves, tree = pytree.tree_flatten(call)
        key = unit.path, source, owner, len(leaves)  # the same for all lanes: none but the first
        # may ask the ranks, as the tokens of those before are on their way.
        if key not in self._agreed.moves:
            sums = self._ranks.gather([*map(_digest, leaves)], _WHAT)
            differ = zip(sums[source], sums[owner], strict=True)
            self._agreed.moves[key] = tuple(n for n, (a, b) in enumerate(differ) if a != b)
        moving = self._agreed.moves[key]
        has_shapes = all(leaves[number] is hidden for number in moving)  # those of hidden states
        if rank == source:
            sent = [leaves[number].contiguous() for number in moving]
            if not has_shapes:
                self._ranks.send(owner, [_shapes(sent).to(hidden.device)])
            self._ranks.send(owner, sent)
        elif rank == owner:
            rooms = [_room(leaves[number]) for number in moving]
            if not has_shapes:
                told = torch.empty(len(moving), _DIMS, dtype=torch.int64, device=hidden.device)
                shapes = self._ranks.receive(source, [told])[0].tolist()
                rooms = [
                    room.new_empty(sizes[:dims])
                    for room, (dims, *sizes) in zip(rooms, shapes, strict=True)
                ]
            for number, leaf in zip(moving, self._ranks.receive(source, rooms), strict=True):
                leaves[number] = leaf
        moved: Call = pytree.tree_unflatten(leaves, tree)
        return moved

    def _as_block(
        self,
        unit: Unit,
        call: Hashable,
        given: Iterable[Any],
        hidden: torch.Tensor,
        output: Any,
        owner: int,
    ) -> Any:
        """Return a block's output, or what stands for it; count its tokens in the cache."""
        if call not in self._agreed.forms:
            form = _form_of(output) if self._ranks.rank == owner else None
            self._agreed.forms[call] = self._ranks.gather(form, _WHAT)[owner]
        if self._ranks.rank == owner:
            return output
        noted = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        for value in given:
            if isinstance(value, EncoderDecoderCache):
                value.self_attention_cache.update(noted, noted, unit.index)
            elif isinstance(value, Cache):
                value.update(noted, noted, unit.index)
        form = self._agreed.forms[call]
        if form is None:
            return hidden
        others = (hidden.new_empty(0) if there else None for there in form[1:])
        return (hidden, *others)


def _form_of(output: Any) -> Form:
    if isinstance(output, torch.Tensor):
        return None
    if isinstance(output, tuple) and isinstance(output[0], torch.Tensor):
        return tuple(isinstance(each, torch.Tensor) for each in output)
    raise ModelError(f"a block returns a {type(output).__name__}, not its hidden states first")


def _digest(leaf: Any) -> object:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return None
    return tuple(leaf.shape), str(float(leaf.double().sum()))


def _shapes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = [[t.dim(), *t.shape, *[0] * (_DIMS - 1 - t.dim())] for t in tensors]
    return torch.tensor(rows, dtype=torch.int64)


def _room(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
