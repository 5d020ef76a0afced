"""Run one cell on fake tensors: what it would save, return, and compute.

The cell runs as a separate stage through the engine's code, so the counts include what the engine
does: copies of inputs that are changed in place, BatchNorms, skips.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stagewise.batch.layouts import num_bytes
from stagewise.batch.values import Apart, leaf_of, optionals, take_apart
from stagewise.engine.stage.activation_meter import ActivationMeter, StorageKey, storage_key
from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.stage.buffers import BufferKeeper
from stagewise.engine.stage.keywords import as_leaves
from stagewise.engine.stage.loss import Loss
from stagewise.engine.stage.randomness import CellRandomness
from stagewise.engine.stage.skips import SkipRoutes
from stagewise.engine.stage.work import Mode, Parts, Work
from stagewise.errors import CellError, ModelError
from stagewise.model.cell import Cell
from stagewise.planning.roofline import Op
from stagewise.profiling.fakes import fake_module
from stagewise.profiling.op_counter import OpCounter
from stagewise.schedule import Instruction, Kind

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One microbatch, of fake tensors."""

    inputs: object
    target: object
    keywords: Mapping[str, object]
    num_samples: int
    num_args: int


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a cell's forward does.

    `messages` are what it sends; `kept` are the bytes of the storages that it adds (saved by
    autograd, or outputs), `unsaved` those of outputs that the cell does not save itself,
    `released` those of them that are free once sent, and `saved` all that autograd saves.
    """

    ops: tuple[Op, ...]
    messages: tuple[Apart, ...]
    kept: Mapping[StorageKey, int]
    unsaved: Mapping[StorageKey, int]
    released: frozenset[StorageKey]
    saved: frozenset[StorageKey]


@dataclass(frozen=True, kw_only=True)
class Backward:
    """What a cell's backward does; `gradient_bytes` per input tensor, or None without gradient.

    If it is split: the operators of `I`, the bytes that it keeps for `W`, and the part of these
    that is the cell's input.
    """

    ops: tuple[Op, ...]
    gradient_bytes: tuple[int | None, ...]
    input_ops: tuple[Op, ...]
    deferred_bytes: int
    deferred_input_bytes: int


class CellTrial:
    """Runs one cell; call everything inside a `fake_mode`.

    The memory of `of_batch`, a part of what the cell `received`, belongs to the caller and is not
    counted as kept.
    """

    def __init__(
        self,
        cell: Cell,
        routes: SkipRoutes,
        batch: Batch,
        *,
        received: Sequence[object],
        of_batch: Sequence[torch.Tensor],
        num_messages: int,
        loss: Loss | None,
    ) -> None:
        self._original, self._batch, self._received = cell, batch, [*map(take_apart, received)]
        self._cell = replace(cell, module=fake_module(cell.module))
        self._of_batch = *of_batch, batch.inputs, batch.target, dict(batch.keywords)
        self._num_messages, is_last = num_messages, num_messages == 0
        self._stage = routes.stage(cell.index, (self._cell,), CPU, is_last=is_last, loss=loss)
        self._stage.buffers = BufferKeeper([self._cell.module], has_values=False)
        self._batchnorms = BatchNorms([self._cell])
        self._target = batch.target if self._stage.needs_target else None
        self._forward()  # detects whether the cell changes its inputs in place

    def forward(self) -> Forward:
        """Count a forward."""
        meter = self._meter(self._target)
        with meter.counting():
            work, value, ops = self._forward()
            given = take_apart((work.parts.inputs, work.parts.keywords))[0]
            arrived = {*map(storage_key, given), *self._arrived()}
            messages = self._messages(value)
            near, *far = [tensors for tensors, _ in messages] or [[]]
            outputs = [*near, *itertools.chain.from_iterable(far)]
            saved, unsaved = meter.saved, meter.unsaved(outputs)
            held = meter.unsaved([*outputs, *self._stage.held()])
        kept = {k: size for k, size in {**saved, **held}.items() if k not in arrived}
        only_near = set(map(storage_key, near)) - set(map(storage_key, outputs[len(near) :]))
        return Forward(
            ops=ops,
            messages=messages,
            kept=kept,
            unsaved=unsaved,
            # What a cell only passes on is free too if it keeps nothing else.
            released=frozenset(k for k in only_near & unsaved.keys() if k in kept or not kept),
            saved=frozenset(saved),
        )

    def backward(self, wanted: Sequence[bool]) -> Backward:
        """Count a backward; `wanted` says which outputs have a gradient.

        Parameters already have gradients, to which it adds, as for all microbatches but the first.
        """
        ops, gradients = self._backward(Kind.BACKWARD, wanted)
        meter = self._meter(self._of_batch)
        with meter.counting():
            input_ops, _ = self._backward(Kind.BACKWARD_INPUT, wanted)
            kept = meter.saved | meter.unsaved(self._stage.held())
        arrived = self._arrived()
        return Backward(
            ops=ops,
            gradient_bytes=gradients,
            input_ops=input_ops,
            deferred_bytes=sum(kept.values()),
            deferred_input_bytes=sum(kept[key] for key in kept.keys() & arrived),
        )

    def _messages(self, value: Any) -> tuple[Apart, ...]:
        return tuple(value) if self._num_messages > 1 else (value,) * self._num_messages

    def _arrived(self) -> set[StorageKey]:
        return {storage_key(tensor) for tensors, _ in self._received for tensor in tensors}

    def _meter(self, given: object) -> ActivationMeter:
        """Return a meter that ignores the cell's parameters and buffers, and `given`."""
        module = self._cell.module
        own = [*module.parameters(), *module.buffers()]
        return ActivationMeter([*own, *take_apart(given)[0]])

    def _forward(self) -> tuple[Work, Any, tuple[Op, ...]]:
        self._stage.clear()
        self._stage.begin()
        work = self._work()
        instruction = Instruction(self._cell.index, Kind.FORWARD, 0)
        with self._batchnorms.one_update(training=False):
            received = [([*map(leaf_of, tensors)], form) for tensors, form in self._received]
            value, ops = self._run(instruction, received, work)
        return work, value, ops

    def _backward(
        self, kind: Kind, wanted: Sequence[bool]
    ) -> tuple[tuple[Op, ...], tuple[int | None, ...]]:
        work, value, _ = self._forward()
        for parameter in self._cell.module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        outputs = itertools.chain.from_iterable(tensors for tensors, _ in self._messages(value))
        gradients = tuple(
            torch.empty_like(output) if is_wanted else None
            for output, is_wanted in zip(outputs, wanted, strict=False)
        )
        instruction = Instruction(self._cell.index, kind, 0)
        result, ops = self._run(instruction, [take_apart(gradients)], work)
        return ops, tuple(None if g is None else num_bytes(g) for g in _flat(result))

    def _run(
        self, instruction: Instruction, received: list[Apart], work: Work
    ) -> tuple[Any, tuple[Op, ...]]:
        counter = OpCounter()
        try:
            with counter:
                return self._stage.action(instruction)(received, work), counter.ops
        except CellError as error:
            cause = error.__cause__ or error
        except RuntimeError as error:  # in the backward
            cause = error
        name, kind = self._original.name, type(self._original.module).__name__
        at = f" at {counter.running}" if counter.running else ""
        raise ModelError(
            f"cell {name!r} ({kind}) cannot be estimated{at}: {type(cause).__name__}: {cause}\n"
            "An estimate runs the model without values, so every operator must work on shapes "
            "alone (torch.library.register_fake adds a kernel for that). Or measure the model "
            "instead, if it fits on this machine: leave the device out."
        ) from cause

    def _work(self) -> Work:
        batch = self._batch
        targets, leaves = as_leaves([] if self._target is None else [self._target])
        return Work(
            mode=Mode.TRAIN,
            sizes=(batch.num_samples,),
            by_samples=(1.0,),
            parts=Parts(
                inputs=[batch.inputs] if self._cell.index == 0 else [],
                targets=targets,
                leaves=leaves,
                keywords=[dict(batch.keywords)] if batch.keywords else [],
            ),
            num_args=batch.num_args,
            randomness={CPU: CellRandomness(0, 0, CPU)},
            batchnorms=self._batchnorms,
        )


def _flat(result: Any) -> list[torch.Tensor | None]:
    """Return the gradients of all messages in one list; none for the first cell."""
    aparts = result if isinstance(result, list) else [result] if result is not None else []
    return [gradient for apart in aparts for gradient in optionals(apart)]
