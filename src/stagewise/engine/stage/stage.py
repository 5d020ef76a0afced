"""One stage at work: what each instruction does with one microbatch.

A stage is a graph island: detached tensors in, outputs out. Its saved state per microbatch is a
`_Flight`: the inputs, and while a graph exists, the roots of that graph. `F` makes the graph, or
only the output if the microbatch is recomputed; `R` makes the graph again with the same seeds,
buffers and autocast; `B` uses it once and drops it; `I` uses it, and leaves for `W` what that
needs of it.
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.autograd.graph import Node

from stagewise.batch.objects import opened
from stagewise.batch.values import Structure, detached, put_together, shared, take_apart
from stagewise.engine.stage.autograd import (
    copy_of,
    keeping,
    leaf_of,
    run_backward,
    without_autocast,
    without_weight_cache,
)
from stagewise.engine.stage.buffers import BufferKeeper, Saved
from stagewise.engine.stage.call import Call, CellForward, Mode
from stagewise.engine.stage.keywords import CellKeywords, invoke, keywords_of
from stagewise.engine.stage.same_again import Sampled, sampled
from stagewise.engine.stage.split_backward import Product, backward_inputs, backward_weights
from stagewise.errors import BatchError, CellError, UsageError
from stagewise.model.added_losses import MAIN_LOSS, AddedLoss, LossCollector, collecting
from stagewise.model.cell import Cell, Chain
from stagewise.schedule import Instruction, Kind

Loss = Callable[..., torch.Tensor | Mapping[str, torch.Tensor]]
Gradients = tuple[torch.Tensor | None, ...]
_TRAINING, _REQUIRES_GRAD = map(operator.attrgetter, ("training", "requires_grad"))
_NO_KEYWORDS: Mapping[str, object] = {}


@dataclass(slots=True)
class _Flight:
    """A microbatch between its forward and its backward."""

    inputs: list[torch.Tensor]  # detached leaves
    structure: Structure
    gradients: list[torch.Tensor | None]  # of the inputs, once the graph ran backward
    entries: Sequence[Node] = ()  # where the graph begins, at the inputs
    roots: Sequence[torch.Tensor] = ()  # outputs with graph, or the losses
    names: tuple[str, ...] = ()  # of the losses
    added: Sequence[AddedLoss] = ()  # by the cells, with graph
    sampled: Sampled | None = None  # of the outputs, where they are to come out again
    buffers: Saved | None = None
    # Tensors given by name follow the received ones in `inputs`.
    keywords: Sequence[CellKeywords] = ()

    def slot(self, index: int) -> tuple[list[torch.Tensor | None], int]:
        """Where the gradient of input `index` is kept."""
        for given in self.keywords:
            if index in given.places:
                return given.gradients, index - given.places.start
        return self.gradients, index


class Stage:
    """The cells of one stage on one device."""

    def __init__(
        self, index: int, cells: Chain, device: torch.device, *, is_last: bool, loss: Loss | None
    ) -> None:
        self.index, self.cells, self.device = index, cells, device
        self.is_last, self.loss = is_last, loss
        # Whether this stage computes a loss from output and target, not from output alone.
        self.needs_target = is_last and loss is not None and takes_target(loss)
        self._calls: Sequence[tuple[Cell, CellForward]] = [
            (cell, partial(invoke, cell.module)) for cell in cells
        ]
        self._modules = [module for cell in cells for module in cell.module.modules()]
        self._parameters = [p for cell in cells for p in cell.module.parameters()]
        self.buffers = BufferKeeper([cell.module for cell in cells])
        self._flights: dict[int, _Flight] = {}
        self._deferred: dict[int, list[Product]] = {}  # from `I` to `W`
        # Per input tensor, learnt from the first run: do the cells change it in place?
        self._mutates: dict[tuple[object, ...], tuple[bool, ...]] = {}
        self._flags: int | None = None  # a number for those of the running call
        self._known_flags: dict[tuple[bool, ...], int] = {}

    def flags(self) -> tuple[bool, ...]:
        """What decides, besides the inputs, which gradients there are and what is mutated."""
        return (
            *map(_TRAINING, self._modules),
            *map(_REQUIRES_GRAD, self._parameters),
        )

    def run(self, instruction: Instruction, received: list[object], call: Call) -> object:
        """Run `instruction` on what was received for it; returns the value to send on."""
        return ACTIONS[instruction.kind](self, instruction.microbatch, received, call)

    def held(self) -> Iterator[torch.Tensor]:
        """The tensors kept from forward to backward, besides those that autograd saved."""
        for flight in self._flights.values():
            yield from flight.inputs
        yield from self.roots()
        for products in self._deferred.values():
            for product in products:
                yield from (tensor for tensor in product.received if tensor is not None)

    def roots(self) -> Iterator[torch.Tensor]:
        """The outputs of the microbatches in flight, while their graphs exist."""
        for flight in self._flights.values():
            yield from flight.roots
            yield from (loss.value for loss in flight.added)

    def clear(self) -> None:
        """End a call; what a failed one left in flight is forgotten."""
        self._flights.clear()
        self._deferred.clear()
        self._flags = None

    def forward(self, m: int, received: list[object], call: Call) -> object:
        """Run microbatch m; keep its graph unless it is recomputed later.

        The graph is made in any case: kernels choose their order of summation, and modules their
        way, by whether gradients are on, and the recomputation must give the same bits. It is
        dropped at once, so the peak is that of the recomputation.
        """
        inputs, structure = take_apart(received[0] if received else call.inputs[m])
        flight = _Flight([leaf_of(tensor) for tensor in inputs], structure, [None] * len(inputs))
        if call.keywords:
            flight.keywords = keywords_of(self.cells, m, call, first_place=len(inputs))
            for given in flight.keywords:
                flight.inputs += [leaf_of(tensor.to(self.device)) for tensor in given.tensors]
        training = call.mode is Mode.TRAIN
        recomputed = (self.index, m) in call.recomputed
        with (
            self.buffers.forward(remember=recomputed) as flight.buffers,
            call.batchnorms.noting(self.index, m),
        ):
            output = self._run_cells(flight, Kind.FORWARD, m, call)
        roots, output_structure = take_apart(output)
        if flight.added:
            call.check_added()
            call.added.setdefault(m, []).extend(map(_detached, flight.added))
        if training:
            self._flights[m] = flight
            flight.roots = roots
            if recomputed:
                flight.roots, flight.added, flight.sampled = (), (), sampled(roots, call)
        return put_together([_sent(root) for root in roots], output_structure)

    def recompute(self, m: int, received: list[object], call: Call) -> object:
        """Make the graph of microbatch m again, from its inputs."""
        flight = self._flights[m]
        with self.buffers.recompute(flight.buffers or {}):
            output = self._run_cells(flight, Kind.RECOMPUTE, m, call)
        flight.roots, _ = take_apart(output)
        if flight.sampled is not None and flight.sampled.differs(flight.roots):
            names = [cell.name for cell in self.cells]
            call.randomness[self.device].check_recomputed(self.index, names, m)
        return None

    def backward(self, m: int, received: list[object], call: Call) -> object:
        """Run microbatch m's graph backward; returns a gradient, or None, per input tensor."""
        flight = self._flights.pop(m)
        roots, gradients = self._roots_of(flight, m, received, call)
        if roots:
            with without_autocast(self.device.type):
                run_backward(roots, gradients)
        return self._input_gradients(flight, m, call)

    def backward_input(self, m: int, received: list[object], call: Call) -> object:
        """As `backward`, but put off what only parameters need, where that can be put off."""
        flight = self._flights.pop(m)
        roots, gradients = self._roots_of(flight, m, received, call)
        # Such a hook (not a full one) sees what its module's last node gives, weights included.
        if any(module._is_full_backward_hook is False for module in self._modules):
            self._flights[m] = flight
            return self.backward(m, received, call)
        if roots:
            with without_autocast(self.device.type):
                self._deferred[m] = backward_inputs(roots, gradients, flight.entries)
            for leaf in flight.inputs:  # what is left of the graph ends there
                leaf.data = leaf.new_empty(0)
        return self._input_gradients(flight, m, call)

    def backward_weight(self, m: int, received: list[object], call: Call) -> object:
        """Add to the parameters' gradients what `backward_input` put off."""
        with without_autocast(self.device.type):
            backward_weights(self._deferred.pop(m, []))
        return None

    def _roots_of(
        self, flight: _Flight, m: int, received: list[object], call: Call
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where microbatch m's backward starts, and with which gradients."""
        gradients: Gradients = _loss_gradients(flight, m, call) if self.is_last else received[0]  # type: ignore[assignment]
        roots, seeds = [], []
        for root, gradient in zip(flight.roots, gradients, strict=True):
            if root.requires_grad and gradient is not None:
                roots.append(root)
                seeds.append(gradient)
        for loss in flight.added:
            if loss.value.requires_grad:
                share = call.weight(m) * call.scaling.gradient_scale
                roots.append(loss.value)
                seeds.append(torch.full_like(loss.value, share))
        return roots, seeds

    def _input_gradients(self, flight: _Flight, m: int, call: Call) -> Gradients:
        result = tuple(flight.gradients)
        if self.index == 0:
            call.input_gradients[m] = result
        return result

    def _run_cells(self, flight: _Flight, kind: Kind, m: int, call: Call) -> object:
        """Run the cells, and the loss on the last stage.

        Cells that change their input in place work on a copy, since the input is needed again.
        Until it is known which do, all get copies.
        """
        key = self._key(flight, call)
        mutates = self._mutates.get(key)
        if mutates is None:
            fed = [*map(copy_of, flight.inputs)]
        else:
            fed = [
                copy_of(leaf) if mutated else leaf[...]
                for leaf, mutated in zip(flight.inputs, mutates, strict=True)
            ]
        entries = flight.entries = []
        for index, tensor in enumerate(fed):
            node = tensor.grad_fn
            if node is not None:
                node.register_prehook(keeping(*flight.slot(index)))
                entries.append(node)
        versions = [tensor._version for tensor in fed]
        value = put_together(fed, flight.structure)
        keywords = {named.cell: named.values(fed) for named in flight.keywords}
        running: Cell | None = None
        randomness, tied = call.randomness[self.device], call.stand_ins
        collector, calls = LossCollector(), self._calls
        if call.look is not None and kind is Kind.FORWARD:
            calls = call.look.cells(calls, collector, m, self.cells[-1] if self.is_last else None)
        outer = collecting(collector)
        try:
            with without_weight_cache(self.device.type):
                for running, forward in calls:
                    index = collector.cell = running.index
                    randomness.enter_cell(index, m)
                    given = keywords.get(index, _NO_KEYWORDS) if keywords else _NO_KEYWORDS
                    if index in tied.cells:
                        with tied.inside(index):
                            value = forward(value, given)
                    else:
                        value = forward(value, given)
                running = None
                if self.is_last and call.keeps_outputs and kind is Kind.FORWARD:
                    call.outputs[m] = detached(value)
                if self.is_last:
                    value = self._end(value, flight, m, call)
        except UsageError:
            raise
        except Exception as error:
            raise CellError(
                f"{_words(running)} failed on microbatch {m}: {type(error).__name__}: {error}\n"
                f"(instruction {Instruction(self.index, kind, m)} on stage {self.index}, "
                f"device {self.device})"
            ) from error
        finally:
            collecting(outer)
        flight.added = collector.added
        if torch.is_grad_enabled() is not (call.mode is Mode.TRAIN):
            torch.set_grad_enabled(call.mode is Mode.TRAIN)
            if call.mode is Mode.TRAIN:
                raise CellError(
                    f"the cells of stage {self.index} left gradients switched off on microbatch "
                    f"{m}, for all that follows; use `with torch.no_grad():`, or cut the model so "
                    "that they are switched on again in the same stage"
                )
        changed = tuple([now._version != before for now, before in zip(fed, versions, strict=True)])
        if True in changed:
            self._check_changes(flight, changed, mutates, m)
        if mutates is None:
            self._mutates[key] = changed
        return value

    def _check_changes(
        self, flight: _Flight, changed: tuple[bool, ...], known: tuple[bool, ...] | None, m: int
    ) -> None:
        """Raise CellError if cells may not have changed these inputs in place."""
        received = flight.inputs[: len(flight.gradients)]  # each keyword is its cell's own
        if known is None and any(map(operator.and_, changed, shared(received))):
            raise CellError(
                f"a cell of stage {self.index} changed a tensor in place that shares memory with "
                "another one from the stage before (a view of it?), which keeps its old value "
                "there; let the cell before return a clone, or change a clone of it"
            )
        if known is not None and any(map(operator.gt, changed, known)):
            raise CellError(
                f"stage {self.index} changed an input in place on microbatch {m}, but not on the "
                "first; make its first cell change its input always or never"
            )

    def _end(self, output: object, flight: _Flight, m: int, call: Call) -> object:
        """Past the last cell: record the output, or compute the losses and record those."""
        if call.mode is Mode.PREDICT:
            call.outputs[m] = output
            return opened(output)
        if not call.counts(m):  # its mean over nothing would be NaN
            return output
        call.randomness[self.device].enter_loss(m)
        value = output if self.loss is None else self.loss(output, *call.targets[m : m + 1])
        by_name = value if isinstance(value, Mapping) else {MAIN_LOSS: value}
        if not by_name:
            raise BatchError("the loss function returned an empty dict; return at least one loss")
        losses = {name: self._checked_loss(name, loss) for name, loss in by_name.items()}
        if call.look is not None and self.loss is not None and m not in call.losses:
            call.look.loss_ran(self.loss, m, output, call.targets[m : m + 1])
        call.losses[m] = {name: loss.detach() for name, loss in losses.items()}
        flight.names = tuple(losses)
        # A tensor that is two losses is a root twice.
        return (
            tuple(losses.values()) if len(losses) == 1 else tuple(x[...] for x in losses.values())
        )

    def _checked_loss(self, name: str, loss: object) -> torch.Tensor:
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            return loss
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise BatchError(
            f"the {name} must be one number, a mean over the samples, or a dict of such numbers, "
            f"but it is {got}; "
            + (
                "give Pipeline a loss function"
                if self.loss is None
                else "let the loss function return a mean"
            )
        )

    def _key(self, flight: _Flight, call: Call) -> tuple[object, ...]:
        """What decides whether cells change their inputs in place."""
        inputs = [tensor.requires_grad for tensor in flight.inputs]
        if self._flags is None:
            self._flags = self._known_flags.setdefault(self.flags(), len(self._known_flags))
        names = call.keywords[0] if call.keywords else ()
        return (call.mode is Mode.TRAIN, self._flags, *inputs, *names)


def takes_target(loss: Loss) -> bool:
    """Whether `loss` takes more than the output, by its signature."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return True
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return several or sum(p.kind in by_position for p in parameters) > 1


ACTIONS = {
    Kind.FORWARD: Stage.forward,
    Kind.RECOMPUTE: Stage.recompute,
    Kind.BACKWARD: Stage.backward,
    Kind.BACKWARD_INPUT: Stage.backward_input,
    Kind.BACKWARD_WEIGHT: Stage.backward_weight,
}


def _words(cell: Cell | None) -> str:
    return "loss" if cell is None else f"cell {cell.name!r} ({type(cell.module).__name__})"


def _loss_gradients(flight: _Flight, m: int, call: Call) -> Gradients:
    """What each loss of microbatch m counts; for one that does not count, of its output."""
    scale = call.scaling.gradient_scale
    if not flight.names:
        return tuple(map(torch.zeros_like, flight.roots))
    shares = (call.share(name, m) for name in flight.names)
    return tuple(
        torch.full_like(root, share * scale) if share else None
        for root, share in zip(flight.roots, shares, strict=True)
    )


def _sent(root: torch.Tensor) -> torch.Tensor:
    """A stage's output without its graph, which still says that it needs a gradient."""
    sent = root.detach()
    return sent.requires_grad_() if root.requires_grad else sent


def _detached(loss: AddedLoss) -> AddedLoss:
    return replace(loss, value=loss.value.detach())
