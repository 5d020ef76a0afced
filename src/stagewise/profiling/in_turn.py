"""Measure on a device that holds one cell at a time, so that the whole model need not fit there.

Problem: a trial step keeps all cells, their activations and gradients on the device.
Idea: between instructions only the next one's cell is there, and what that cell receives and has
saved; the rest is in the host's memory. Storages are emptied and filled again, as FSDP does (Zhao
et al., arXiv:2304.11277), so that graphs, views and messages that refer to them stay as they are.
Parameters and buffers get the very tensors back that they had. The times of instructions do not
include this.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import nn

from stagewise.batch.layouts import storages
from stagewise.engine.stage.activation_meter import ActivationMeter, SavedTensor, StorageKey
from stagewise.engine.stage.gradient import taken
from stagewise.engine.stage.stage import Stage
from stagewise.engine.step.step import Runner
from stagewise.engine.step.step_request import Request
from stagewise.engine.transport.failure import is_out_of_memory
from stagewise.errors import PlanError
from stagewise.model.cell import Cell
from stagewise.schedule import Instruction, Message
from stagewise.schedule.instruction import KINDS
from stagewise.units import size_in_words

_WHOLE = "cpu", "meta", "mps"  # the host's memory, or none, or storages that cannot be emptied


def takes_turns(device: torch.device) -> bool:
    """Return whether cells take turns on `device`."""
    return device.type not in _WHOLE


def can_take_turns(module: nn.Module) -> bool:
    """Return whether `module` is only its plain tensors, not, say, quantised weights."""
    return all(type(part).to is nn.Module.to for part in module.modules()) and all(
        type(tensor.data) is torch.Tensor and tensor.layout is torch.strided
        for tensor in _tensors(module)
    )


class Together:
    """Trial steps in which all cells are on the device."""

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        self.meter = ActivationMeter(excluded)

    def run(self, runner: Runner, request: Request) -> None:
        """Run one trial step."""
        runner.run(request)


class InTurn(Together):
    """Trial steps with one cell at a time on `device`; `under_way` is what waits to be received."""

    def __init__(
        self,
        excluded: Iterable[torch.Tensor],
        device: torch.device,
        under_way: dict[Message, list[torch.Tensor]],
    ) -> None:
        excluded = [*excluded]
        self.meter = _Meter(excluded, self)
        self._given = {s._cdata for tensor in excluded for s in storages(tensor)}
        self._device, self._under_way = torch.empty(0, device=device).device, under_way
        self._homes: dict[torch.Tensor, torch.Tensor] = {}  # what a parameter here has at home
        self._copies: dict[torch.Tensor, torch.Tensor] = {}  # its own here, empty at other times
        self._own: dict[int, torch.Tensor] = {}  # by the storages of these
        self._saved: dict[int, dict[int, torch.UntypedStorage]] = {}  # by stage
        self._emptied: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        self._stage = -1  # whose cell is here

    def run(self, runner: Runner, request: Request) -> None:
        """Run one trial step; PlanError if a cell does not fit by itself."""
        order, observe = runner.schedule.programs[0], request.observe
        following: dict[Instruction, Instruction] = {}

        def observed(instruction: Instruction) -> None:
            if observe is not None:
                observe(instruction)
            if not following:
                following.update(itertools.pairwise(runner.running))
            self._move_on(runner.stages, instruction, following.get(instruction))

        try:
            with self._cleared(), self.meter.counting():
                self._enter(runner.stages[order[0].stage])
                runner.run(replace(request, observe=observed))
        except Exception as error:
            if isinstance(error, PlanError) or not is_out_of_memory(error):
                raise
            ran = {instruction for _, instruction, *_ in runner.last_run.times}
            failed = next((i for i in order if i not in ran), order[-1])
            raise self._too_large(runner.stages[failed.stage].cells[0], error) from error

    def keeps(self, tensor: torch.Tensor) -> bool:
        """Note a tensor that the graph of the running cell saves; return whether it is a cell's."""
        found = {storage._cdata: storage for storage in storages(tensor)}
        if found.keys() <= self._own.keys():
            return True
        if tensor.device == self._device:
            self._saved.setdefault(self._stage, {}).update(found)
        return False

    def counted(self, sizes: Mapping[StorageKey, int]) -> dict[StorageKey, int]:
        """Return `sizes` with those of what is at home meanwhile, and without the cells' own."""
        return {
            key: self._emptied[key[1]][1].nbytes if key[1] in self._emptied else size
            for key, size in sizes.items()
            if key[1] not in self._own
        }

    def _move_on(
        self, stages: Mapping[int, Stage], ran: Instruction, then: Instruction | None
    ) -> None:
        if "weights" in KINDS[ran.kind].parts:  # nothing that was saved is used again
            self._saved.pop(ran.stage, None)
        if then is None or then.stage != ran.stage:
            self._leave(stages[ran.stage])
        if then is not None and then.stage != ran.stage:
            self._enter(stages[then.stage])
        if then is not None and KINDS[then.kind].frees:
            for parameter in self._homes:
                if parameter.requires_grad and parameter.is_leaf and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # to which a backward adds

    def _enter(self, stage: Stage) -> None:
        self._stage = stage.index
        cell = stage.cells[0]
        try:
            for storage in self._needed(stage):
                self._fill(storage)
            for tensor in _tensors(cell.module):
                if tensor not in self._homes and not _is_at(tensor, self._device):
                    self._put(tensor)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_large(cell, error) from error

    def _leave(self, stage: Stage) -> None:
        if self._homes:
            for buffer in stage.cells[0].module.buffers():
                if buffer not in self._homes:  # made here in forward
                    buffer.data = buffer.data.to("cpu", copy=True)
        self._go_home()
        for storage in self._needed(stage, all_mail=True):
            self._empty(storage)

    def _needed(self, stage: Stage, *, all_mail: bool = False) -> list[torch.UntypedStorage]:
        """Return what is here for `stage`, besides its cell, or is under way to it."""
        mail = (
            tensor
            for message, tensors in self._under_way.items()
            for tensor in tensors
            if all_mail or message.destination_stage == stage.index
        )
        held = (tensor for tensor in (*stage.held(), *mail) if tensor.device == self._device)
        found = {s._cdata: s for tensor in held for s in storages(tensor)}
        found |= self._saved.get(stage.index, {})
        return [storage for key, storage in found.items() if key not in self._given]

    def _empty(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if storage.nbytes() and storage.resizable():
            if key not in self._own:
                self._emptied[key] = storage, _bytes_of(storage).to("cpu", copy=True)
            storage.resize_(0)

    def _fill(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._emptied:
            _, kept = self._emptied.pop(storage._cdata)
            storage.resize_(kept.nbytes)
            _bytes_of(storage).copy_(kept)
        elif storage._cdata in self._own:  # a cell passes on its weight
            self._copied(self._own[storage._cdata])

    def _put(self, tensor: torch.Tensor) -> None:
        """Give a parameter or buffer its copy here."""
        copy = self._copied(tensor)
        self._homes[tensor] = tensor.data
        tensor.data = copy

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = self._copies.get(tensor)
        if copy is None:
            copy = self._copies[tensor] = tensor.data.to(self._device, copy=True)
            self._own[copy.untyped_storage()._cdata] = tensor
        else:
            copy.untyped_storage().resize_(copy.nbytes)
            copy.copy_(tensor.data)
        return copy

    def _go_home(self) -> None:
        while self._homes:
            tensor, home = self._homes.popitem()
            if tensor.requires_grad and tensor.is_leaf:
                taken(tensor)
            tensor.data = home
            self._copies[tensor].untyped_storage().resize_(0)

    @contextmanager
    def _cleared(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._go_home()
            for held in (self._copies, self._own, self._saved, self._under_way):
                held.clear()
            with suppress(torch.OutOfMemoryError):  # after a failure: what a module still has
                while self._emptied:
                    self._fill(next(iter(self._emptied.values()))[0])

    def _too_large(self, cell: Cell, error: Exception) -> PlanError:
        size = size_in_words(sum(tensor.nbytes for tensor in _tensors(cell.module)))
        return PlanError(
            f"cell {cell.name!r} ({type(cell.module).__name__}, {size} of parameters and buffers) "
            f"does not fit on {self._device} by itself, where it was to be measured with its "
            "activations and gradients; use more microbatches or smaller cells, or measure "
            f"elsewhere with plan(device='cpu'): {error}"
        )


class _Meter(ActivationMeter):
    """A meter that counts what is in the host's memory meanwhile too."""

    def __init__(self, excluded: Iterable[torch.Tensor], turns: InTurn) -> None:
        super().__init__(excluded)
        self._turns = turns

    def unsaved(self, held: Iterable[torch.Tensor]) -> dict[StorageKey, int]:
        return self._turns.counted(super().unsaved(held))

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | SavedTensor:
        return tensor if self._turns.keeps(tensor) else super()._pack(tensor)


def _is_at(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device == device


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return list(dict.fromkeys((*module.parameters(), *module.buffers())))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
