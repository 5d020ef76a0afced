"""One stage: what each instruction does with one microbatch.

A stage's graph is an island: detached tensors in, outputs out. Its state per microbatch is a
`Flight`: the inputs and, while a graph exists, its roots. `F` builds the graph, but keeps only the
inputs to be recomputed; `R` builds it again with the same seeds, buffers and autocast; `B` uses and
drops it; `I` uses it and keeps what `W` needs.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stagewise.batch.markers import Arguments
from stagewise.batch.values import Apart, leaf_of, optionals, put_together, take_apart
from stagewise.engine.stage import split_backward
from stagewise.engine.stage.autograd import (
    check_changes,
    feed,
    restore_grad_mode,
    run_backward,
    without_autocast,
    without_weight_cache,
)
from stagewise.engine.stage.buffers import BufferKeeper
from stagewise.engine.stage.flight import Flight, noting, starts_gradients
from stagewise.engine.stage.keywords import (
    asks_by_name,
    failed,
    given_of,
    in_one_call,
    invoke,
    run_cell,
    take_keywords,
)
from stagewise.engine.stage.loss import Loss, add_seeds, end, record_added, seeds_of, takes_target
from stagewise.engine.stage.randomness import CellRandomness
from stagewise.engine.stage.same_again import sampled
from stagewise.engine.stage.split_backward import Product, next_number
from stagewise.engine.stage.work import CellForward, LateGradients, Mode, RunCell, Work
from stagewise.engine.watch.now import NOW
from stagewise.errors import UsageError
from stagewise.model.added_losses import COLLECTING, LossCollector
from stagewise.model.cell import Cell, Chain, together
from stagewise.schedule import Instruction, Kind

Action = Callable[[list[Apart], Work], Any]  # received values -> the value to send
_TRAINING, _REQUIRES_GRAD, _VERSION, _FULL_HOOK = map(
    operator.attrgetter, ("training", "requires_grad", "_version", "_is_full_backward_hook")
)
_NO_KEYWORDS: Mapping[str, object] = {}
_NOTHING: AbstractContextManager[object] = nullcontext()


class Stage:
    """The cells of one stage on one device."""

    def __init__(
        self, index: int, cells: Chain, device: torch.device, *, is_last: bool, loss: Loss | None
    ) -> None:
        self.index, self.cells, self.device = index, cells, device
        self.is_last, self.loss = is_last, loss
        self.needs_target = is_last and loss is not None and takes_target(loss)
        self._calls: Sequence[tuple[Cell, CellForward]] = [
            (cell, partial(invoke, cell.module)) for cell in cells
        ]
        self._modules = [module for cell in cells for module in cell.module.modules()]
        self._parameters = [p for cell in cells for p in cell.module.parameters()]
        self.buffers = BufferKeeper([cell.module for cell in cells])
        self._flights: dict[int, Flight] = {}
        self._deferred: dict[int, list[Product]] = {}  # from `I` to `W`
        # Whether the first run changed each input in place, by key of the call.
        self._mutates: dict[tuple[object, ...], tuple[bool, ...]] = {}
        self._known_flags: dict[tuple[bool, ...], int] = {}
        self._flags = 0  # index of the running call's flags
        self.trains = self.has_own_gradients = False  # by a parameter; by anything else
        self._run_cell: RunCell = run_cell
        self._calls_modules = True  # directly, without wrappers
        self._together = together(cells)

    def begin(self) -> tuple[bool, ...]:
        """Begin a call; return the flags that, with the inputs, decide which gradients exist."""
        flags = (*map(_TRAINING, self._modules), *map(_REQUIRES_GRAD, self._parameters))
        self._flags = self._known_flags.setdefault(flags, len(self._known_flags))
        self.trains = self.has_own_gradients or True in flags[len(self._modules) :]
        return flags

    def action(self, instruction: Instruction) -> Action:
        """Return the callable that runs `instruction`: from received values to what is sent."""
        return partial(ACTIONS[instruction.kind], self, instruction.microbatch)

    def held(self) -> Iterator[torch.Tensor]:
        """Yield the tensors kept from forward to backward, besides those that autograd saved."""
        for flight in self._flights.values():
            yield from flight.inputs
            yield from flight.ends
            yield from (loss.value for loss in flight.added)
        for products in self._deferred.values():
            for product in products:
                yield from (tensor for tensor in product.received if tensor is not None)

    def clear(self) -> None:
        """End a call, dropping what a failed one left in flight."""
        self._flights.clear()
        self._deferred.clear()

    def forward(self, m: int, received: list[Apart], work: Work) -> Apart | None:
        """Run microbatch m; keep its graph unless it is recomputed later.

        The graph is built even then: kernels and modules may compute differently with gradients
        off, and the recomputation must give the same bits. It is dropped at once, so the peak is
        that of the recomputation.
        """
        inputs, structure = received[0] if received else take_apart(work.parts.inputs[m])
        if not received:
            inputs = list(map(leaf_of, inputs))
        flight = Flight(inputs, structure, [None] * len(inputs), len(inputs))
        if work.parts.keywords:
            take_keywords(flight, self.cells, m, work, self.device)
        if work.look is not None:
            work.look.stage_begins(self.cells, self._run_cell, given_of(flight), m)
        recomputed, stateful = (self.index, m) in work.recomputed, self.buffers.owners
        noted = work.batchnorms.noting(self.index, m) if stateful else _NOTHING
        with noting(self.buffers, flight, noted, remember=recomputed) if stateful else _NOTHING:
            output = self._run_cells(flight, Kind.FORWARD, m, work)
        outputs, output_structure = take_apart(output)
        if flight.added:
            record_added(flight.added, m, work)
        if self.index < work.first_trained and starts_gradients(flight, outputs):
            self.has_own_gradients = True
            raise LateGradients(f"stage {self.index} needs a backward")
        if work.mode is Mode.TRAIN and self.index >= work.first_trained:
            self._flights[m] = flight
            if recomputed:
                flight.added, flight.sampled = (), sampled(outputs, m, work)
            else:
                flight.roots, flight.ends = (
                    [*map(_edge_of, outputs)],
                    outputs if self.is_last else (),
                )
        return None if self.is_last else (list(map(leaf_of, outputs)), output_structure)

    def recompute(self, m: int, received: list[Apart], work: Work) -> None:
        """Build the graph of microbatch m again, from its inputs."""
        flight = self._flights[m]
        with self.buffers.recompute(flight.buffers) if flight.buffers else _NOTHING:
            output = self._run_cells(flight, Kind.RECOMPUTE, m, work)
        outputs, _ = take_apart(output)
        flight.roots, flight.ends = [*map(_edge_of, outputs)], outputs if self.is_last else ()
        if flight.sampled is not None and flight.sampled.differs(outputs):
            work.randomness[self.device].check_recomputed(self.index, self.cells, m)

    def backward(self, m: int, received: list[Apart], work: Work) -> Apart | None:
        """Run microbatch m's backward; return a gradient, or None, per input tensor."""
        flight = self._flights.pop(m)
        roots, seeds = self._start_of(flight, m, received, work)
        with without_autocast(self.device.type) if work.is_autocast and roots else _NOTHING:
            run_backward(roots, seeds) if roots else None
        return self._gradients_of(flight, m, work)

    def backward_input(self, m: int, received: list[Apart], work: Work) -> Apart | None:
        """Like `backward`, but defer weight gradients where possible."""
        # A non-full backward hook sees all gradients of its module's last node, weights included.
        if False in map(_FULL_HOOK, self._modules):
            return self.backward(m, received, work)
        flight = self._flights.pop(m)
        roots, seeds = self._start_of(flight, m, received, work)
        if roots:
            with without_autocast(self.device.type) if work.is_autocast else _NOTHING:
                self._deferred[m] = split_backward.backward_inputs(roots, seeds, flight.entries)
            for leaf in flight.inputs:  # the rest of the graph still refers to them
                leaf.data = leaf.new_empty(0)
        return self._gradients_of(flight, m, work)

    def backward_weight(self, m: int, received: list[Apart], work: Work) -> None:
        """Accumulate the weight gradients that `backward_input` deferred."""
        with without_autocast(self.device.type) if work.is_autocast else _NOTHING:
            split_backward.backward_weights(self._deferred.pop(m, []))

    def _start_of(
        self, flight: Flight, m: int, received: list[Apart], work: Work
    ) -> tuple[list[GradientEdge], list[torch.Tensor]]:
        """Return the roots of microbatch m's backward and their gradients."""
        gradients = seeds_of(flight, m, work) if self.is_last else optionals(received[0])
        roots, seeds = [], []
        for root, gradient in zip(flight.roots, gradients, strict=True):
            if root is not None and gradient is not None:
                roots.append(root)
                seeds.append(gradient)
        if flight.added:
            add_seeds(flight.added, m, work, roots, seeds)
        return roots, seeds

    def _gradients_of(self, flight: Flight, m: int, work: Work) -> Apart | None:
        """Return the gradients of the received inputs; record those of keyword arguments."""
        for given in flight.keywords:
            given.gradients[:] = flight.gradients[given.places]
        result = tuple(flight.gradients[: flight.num_received])
        if self.index > 0:
            return take_apart(result)
        if flight.entries:
            work.record.input_gradients[m] = result
        return None

    def _run_cells(self, flight: Flight, kind: Kind, m: int, work: Work) -> object:
        """Run the cells, and the loss on the last stage.

        Inputs that cells change in place are copied, since they are needed again; at first, all.
        """
        names = work.parts.keywords[0] if work.parts.keywords else ()
        key = (work.mode is Mode.TRAIN, self._flags, *map(_REQUIRES_GRAD, flight.inputs), *names)
        mutates = self._mutates.get(key)
        dropped = kind is Kind.FORWARD and (self.index, m) in work.recomputed
        fed, flight.entries = feed(flight.inputs, mutates, None if dropped else flight.gradients)
        versions = list(map(_VERSION, fed))
        with without_weight_cache(self.device.type) if work.is_autocast else _NOTHING:
            value = self._through(fed, flight, kind, m, work)
        if torch.is_grad_enabled() is not (work.mode is Mode.TRAIN):
            restore_grad_mode(self.index, m, training=work.mode is Mode.TRAIN)
        changed = tuple(map(operator.ne, map(_VERSION, fed), versions))
        if True in changed:
            check_changes(self.index, flight.inputs[: flight.num_received], changed, mutates, m)
        if mutates is None:
            self._mutates[key] = changed
        return value

    def _through(
        self, fed: list[torch.Tensor], flight: Flight, kind: Kind, m: int, work: Work
    ) -> object:
        """Run the cells, and on the last stage the loss, on `fed`."""
        value = put_together(fed, flight.structure)
        named: dict[int, Any] = {}
        for given in flight.keywords:
            named[given.cell] = put_together(fed[given.places], given.structure)
        randomness = work.randomness[self.device]
        collector, calls, directly = LossCollector(), self._calls, self._calls_modules
        if work.look is not None and kind is Kind.FORWARD:
            last, again = self.cells[-1] if self.is_last else None, work.again(self.device)
            directly, calls = False, work.look.cells(calls, collector, m, last, again)
        for around in work.around:
            directly, calls = False, around(calls)
        if directly and self._together is not None and not asks_by_name(flight):
            enter = partial(_enter, flight, collector, randomness, m)
            directly, calls = False, [in_one_call(self.cells, self._together, enter)]
        outer, COLLECTING.active = COLLECTING.active, collector
        try:
            for cell, forward in calls:
                NOW.cell, collector.cell, index = cell, cell.index, cell.index
                flight.starts.append(next_number())
                randomness.enter_cell(index, m)
                if directly and index not in named and type(value) is not Arguments:
                    value = cell.module(value)
                else:
                    value = forward(value, named.get(index, _NO_KEYWORDS))
            NOW.cell = None
            flight.starts.append(next_number())
            if self.is_last:
                randomness.enter_loss(m)
                keeps = work.keeps_outputs and kind is Kind.FORWARD
                value = end(self.loss, value, flight, m, work, self.device, keeps=keeps)
        except UsageError:
            raise
        except Exception as error:
            at = Instruction(self.index, kind, m)
            raise failed(cast("Cell | None", NOW.cell), error, at, self.device, work) from error
        finally:
            COLLECTING.active = outer
        flight.added = collector.added
        return value


ACTIONS: Mapping[Kind, Callable[[Stage, int, list[Apart], Work], Apart | None]] = {
    Kind.FORWARD: Stage.forward,
    Kind.RECOMPUTE: Stage.recompute,
    Kind.BACKWARD: Stage.backward,
    Kind.BACKWARD_INPUT: Stage.backward_input,
    Kind.BACKWARD_WEIGHT: Stage.backward_weight,
}


def _edge_of(output: torch.Tensor) -> GradientEdge | None:
    """Return where the gradient of `output` enters the graph, None if it has none."""
    node: Any = output.grad_fn  # torch's function, for nodes written in Python, is slower
    if node is not None and not isinstance(node, BackwardCFunction):
        return GradientEdge(node, output.output_nr)
    return get_gradient_edge(output) if output.requires_grad else None


def _enter(
    flight: Flight, collector: LossCollector, randomness: CellRandomness, m: int, cell: Cell
) -> None:
    """Begin `cell` within the call of an earlier one, as `_through` begins the others."""
    NOW.cell, collector.cell = cell, cell.index
    flight.starts.append(next_number())
    randomness.enter_cell(cell.index, m)
