"""Measure the costs of a model and of links here, for one microbatch, equal on all ranks.

Under torch.distributed all ranks measure at the same time, so the machine is as busy as in
training, and use the mean.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from stagewise.batch.split import extent, first_microbatch, microbatch_sizes
from stagewise.batch.values import move
from stagewise.costs import FREE_LINK, CellCost, LinkCost
from stagewise.engine.stage.loss import Loss
from stagewise.engine.transport.connect import Device, connect, trial_wire, values_of_all
from stagewise.engine.transport.failure import is_out_of_memory
from stagewise.engine.transport.processes import named_device, num_processes, own_device
from stagewise.errors import BatchError, PlanError
from stagewise.model.cell import Cell, Chain
from stagewise.model.cells_of import chain_for, entering
from stagewise.model.chain import Model
from stagewise.model.meta_tensors import is_meta
from stagewise.profiling.in_turn import can_take_turns, takes_turns
from stagewise.profiling.links import LARGE_BYTES, SMALL_BYTES, round_trip_seconds
from stagewise.profiling.trial_steps import MIN_ROUNDS, profile
from stagewise.slow_notice import notice_if_slow

_TIMES = "forward_seconds", "backward_seconds", "input_seconds", "weight_seconds"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A model and an example minibatch to measure it on."""

    model: Model
    chain: Chain
    inputs: object
    target: object
    keywords: dict[str, object]
    loss: Loss | None
    where: torch.device
    devices: tuple[torch.device, ...]  # of the plan, in one process that was told them
    num_samples: int
    parts: tuple[int, ...] | None  # samples per microbatch, if the batch is Microbatches

    def size_of(self, num_microbatches: int) -> int:
        """Return the number of samples in the first microbatch."""
        return (self.parts or microbatch_sizes(self.num_samples, num_microbatches))[0]

    def measured(
        self, size: int, *, seconds: float, split: bool, least: int | None = None
    ) -> tuple[CellCost, ...]:
        """Measure the costs of a microbatch of `size` samples on this rank.

        In about `seconds`, but in `least` rounds (by default MIN_ROUNDS) at least.
        """
        first = first_microbatch((self.inputs, self.target, self.keywords), size)
        taking = takes_turns(self.where)
        whole = [c for c in self.chain if not (taking and can_take_turns(c.module))]
        what = f"measuring {len(self.chain)} cells on {size} samples, for about {seconds:g} s"
        with (
            notice_if_slow(what),
            in_training_mode(self.model, self.chain),
            _moved(whole, self.where),
        ):
            return profile(
                self.chain,
                move(first, self.where),  # type: ignore[arg-type]
                loss=self.loss,
                device=self.where,
                seconds=seconds,
                split=split,
                least=MIN_ROUNDS if least is None else least,
            )


@contextmanager
def _moved(cells: Sequence[Cell], device: torch.device) -> Iterator[None]:
    """Put the cells that are elsewhere on `device`, for the body."""
    homes = {}
    try:
        for cell in cells:
            found = {each.device for each in (*cell.module.parameters(), *cell.module.buffers())}
            if found - {device}:  # `to` fails for quantised weights, even without a move
                homes[cell.module] = found.pop() if len(found) == 1 else None
                _put(cell, device)
        yield
    finally:
        for module, home in homes.items():
            if home is not None:
                module.to(home)


def _put(cell: Cell, device: torch.device) -> None:
    try:
        cell.module.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise PlanError(
            f"the cells that must be on {device} together to be measured do not fit there; measure"
            " elsewhere with plan(device='cpu'), or train with --plan and a file that "
            "stagewise plan --device DEVICE --json wrote, which measures nothing"
        ) from error


@contextmanager
def in_training_mode(model: Model, chain: Chain) -> Iterator[None]:
    """Put a model that is entirely in eval mode into training mode, as it will be when it trains.

    A model that is partly in eval mode (such as with frozen BatchNorms) is not changed. Every
    module's mode is restored.
    """
    roots = [model] if isinstance(model, nn.Module) else []
    inside = {module for root in roots for module in root.modules()}
    roots += [cell.module for cell in chain if cell.module not in inside]
    before = [(module, module.training) for root in roots for module in root.modules()]
    if any(training for _, training in before):
        yield
        return
    try:
        for root in roots:
            root.train()
        yield
    finally:
        for module, training in before:
            module.training = training


def example_of(
    model: Model,
    inputs: object,
    target: object,
    kwargs: Mapping[str, object] | None,
    loss: Loss | None,
    device: Device | Sequence[Device] | None,
) -> Example:
    """Check the arguments of `stagewise.plan` and return them as an Example.

    Raises BatchError if nothing has samples, PlanError for a model on the meta device.
    """
    keywords = dict(kwargs or {})
    chain = chain_for(model, inputs, keywords)
    if is_meta(chain):
        raise PlanError(
            "the model is on the meta device, where nothing can be measured; give plan() a "
            "balance and no inputs, or build the model on a real device"
        )
    batch = extent([("inputs", inputs), ("target", target), *keywords.items()])
    if batch.num_samples is None:
        raise BatchError(
            "nothing in the example has samples; pass tensors with samples along dimension 0"
        )
    here, _ = connect("local", None, chain, 1)
    listed = device if isinstance(device, Sequence) and not isinstance(device, str) else ()
    devices = tuple(map(named_device, listed))
    if device is None or listed:
        where = devices[0] if devices else own_device() if num_processes() > 1 else here[0]
    else:
        assert isinstance(device, torch.device | str)
        where = named_device(device)
    first, named = entering(model, inputs, keywords)
    return Example(
        model=model,
        chain=chain,
        inputs=first,
        target=target,
        keywords=named,
        loss=loss,
        where=where,
        devices=devices,
        num_samples=batch.num_samples,
        parts=None if batch.sizes is None else tuple(batch.sizes),
    )


def agreed_costs(
    cells: tuple[CellCost, ...], where: torch.device
) -> tuple[tuple[CellCost, ...], LinkCost]:
    """Return the mean of all ranks' times, and the cost of a message between ranks `where`."""
    if num_processes() == 1:
        return cells, FREE_LINK
    ranks = values_of_all((cells, *_link_times(where)), "plan: what was measured")
    all_cells = [cells for cells, _, _ in ranks]
    small = max(seconds for _, seconds, _ in ranks)
    large = max(seconds for _, _, seconds in ranks)
    mean = tuple(_mean(same) for same in zip(*all_cells, strict=True))
    per_byte = max(0.0, large - small) / (LARGE_BYTES - SMALL_BYTES)
    return mean, LinkCost(latency_seconds=small, seconds_per_byte=per_byte)


def _mean(same: Sequence[CellCost]) -> CellCost:
    """Return one cell's costs with the mean of the ranks' times; bytes are equal on all."""
    times: dict[str, float] = {}
    for name in _TIMES:
        values = [getattr(cell, name) for cell in same]
        if None not in values:
            times[name] = statistics.fmean(values)
    return replace(same[0], **times)  # type: ignore[arg-type]


def _link_times(device: torch.device) -> tuple[float, float]:
    """Return median one-way seconds of a small and a large message between ranks 0 and 1."""
    wire = trial_wire(device)
    small, large = (
        round_trip_seconds(wire, device, (0, 1), size, size) / 2
        for size in (SMALL_BYTES, LARGE_BYTES)
    )
    return small, large
