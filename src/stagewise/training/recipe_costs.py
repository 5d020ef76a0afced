"""The costs of a recipe's model, estimated for a device or measured here, and facts for advice."""

import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import stagewise
from stagewise.batch.split import extent
from stagewise.costs import FREE_LINK, CellCost
from stagewise.engine.transport.connect import Device
from stagewise.engine.transport.processes import devices_here, num_processes, own_rank
from stagewise.errors import BatchError
from stagewise.model.cell import Chain
from stagewise.model.cells_of import chain_for
from stagewise.model.chain import chain_of
from stagewise.pipeline.plan_model import measured_plan
from stagewise.planning.advice.advise_facts import Facts
from stagewise.planning.advice.advise_rules import MICROBATCHES_PER_STAGE
from stagewise.planning.alternatives import Room
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.request import PlanRequest
from stagewise.planning.reserve import reserve_of
from stagewise.profiling.example import Example, example_of
from stagewise.profiling.fakes import likeness
from stagewise.training.batches import TrainingBatches
from stagewise.training.recipe import Batch, Model, Recipe, build_model
from stagewise.training.state.optimizers import for_training
from stagewise.training.state.random_states import seed_everything

_PROBE = 64  # parameters with which an optimizer's state is measured


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """A recipe's cell costs, its model, and the size of its batches."""

    cells: tuple[CellCost, ...]
    model: Model
    batch_size: int


def estimate_recipe(recipe: Recipe, device: DeviceSpec, num_microbatches: int) -> Estimated:
    """Estimate a recipe's cells; the model is built on the meta device."""
    model, batch = meta_model(recipe), TrainingBatches(recipe, seed=0).first
    cells = estimated(recipe, model, batch, num_microbatches, device)
    return Estimated(cells=cells, model=model, batch_size=num_samples_of(batch))


def estimated(
    recipe: Recipe, model: Model, batch: Batch, num_microbatches: int, device: DeviceSpec | str
) -> tuple[CellCost, ...]:
    """Return estimated costs of the model's cells on `device`, for one microbatch."""
    inputs, target = batch
    with recipe.precision():
        return stagewise.estimate(
            model,
            inputs,
            target=target,
            loss=recipe.loss,
            num_microbatches=num_microbatches,
            device=device,
        )


def _measured(recipe: Recipe, num_microbatches: int) -> Estimated:
    model, batch = build_model(recipe, seed=0), TrainingBatches(recipe, seed=0).first
    request = PlanRequest(num_stages=1, num_microbatches=num_microbatches)
    with recipe.precision():
        plan = measured_plan(request, recipe_example(recipe, model, batch))
    return Estimated(cells=plan.cells, model=model, batch_size=num_samples_of(batch))


def recipe_example(
    recipe: Recipe, model: Model, batch: Batch, names: Sequence[str] = ()
) -> Example:
    """Return the example with which the model's cells are measured, where they will train.

    `names` are those of the plan's devices.
    """
    inputs, target = batch
    chain_for(model, inputs, {}, recipe.cells)
    where: Device | Sequence[Device] | None = names or None
    if names and num_processes() > 1:
        where = names[own_rank()]
    elif not names and (found := devices_here(1)):
        (where,) = found
    return example_of(model, inputs, target, {}, recipe.loss, where)


def facts_of(
    recipe: Recipe,
    device: DeviceSpec | None,
    *,
    num_devices: int,
    device_memory_bytes: int | None,
    num_microbatches: int | None,
) -> Facts:
    """Return the facts for `stagewise advise`; measured here if `device` is None."""

    def costs_at(count: int) -> Estimated:
        if device is None:
            return _measured(recipe, count)
        return estimate_recipe(recipe, device, count)

    size = num_samples_of(TrainingBatches(recipe, seed=0).first)
    count = num_microbatches or min(MICROBATCHES_PER_STAGE * num_devices, size)
    try:
        found = costs_at(count)
    except BatchError:
        if num_microbatches is not None:
            raise
        count = max(1, size // 2)  # the model was traced for two samples or more at a time
        found = costs_at(count)
    if device is None:
        memory, link = memory_here(num_devices), FREE_LINK
    else:
        memory, link = device.memory_bytes, device.link(num_devices)
    chain = chain_of(found.model)
    return Facts(
        cells=found.cells,
        num_devices=num_devices,
        device_memory_bytes=device_memory_bytes or memory,
        batch_size=found.batch_size,
        num_microbatches=count,
        state_factor=state_factor(recipe, chain),
        link=link,
        has_batchnorm=any(
            isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
            for cell in chain
            for module in cell.module.modules()
        ),
        num_experts=num_experts(chain),
    )


def meta_model(recipe: Recipe) -> Model:
    """Build the recipe's model on the meta device."""
    seed_everything(0)
    with recipe.blame("model() on the meta device"), torch.device("meta"):
        return recipe.model()


def state_factor(recipe: Recipe, chain: Chain) -> float:
    """Return the bytes kept per byte of parameters: itself, its gradient and optimizer state.

    Measured by one optimizer step on a few parameters of the model's first dtype.
    """
    dtypes = [p.dtype for cell in chain for p in cell.module.parameters() if p.requires_grad]
    if not dtypes:
        return 1.0
    probe = nn.Parameter(torch.zeros(1, _PROBE, dtype=dtypes[0]))  # a matrix, as most are
    probe.grad = torch.zeros_like(probe)
    optimizer = recipe.make_optimizer([probe])
    if optimizer is None:  # for vectors alone
        return 2.0
    for_training(optimizer)
    with recipe.blame("a step of the optimizer"):
        optimizer.step()
    state = optimizer.state.get(probe, {}).values()
    kept = sum(t.nbytes for t in state if isinstance(t, torch.Tensor) and t.numel() >= _PROBE)
    return 2.0 + kept / probe.nbytes


def num_experts(chain: Chain) -> dict[int, int]:
    """Return, for cells whose parameters are mostly in a list of equal parts, their number."""
    found = {}
    for cell in chain:
        whole = sum(p.numel() for p in cell.module.parameters())
        for module in cell.module.modules():
            if not isinstance(module, nn.ModuleList) or len(module) < 2:
                continue
            kinds: set[Hashable] = {likeness(part) for part in module}
            inside = sum(p.numel() for p in module.parameters())
            if len(kinds) == 1 and 2 * inside > whole:
                found[cell.index] = len(module)
    return found


def sizes_as_costs(model: Model) -> tuple[CellCost, ...]:
    """Return costs that use each cell's number of parameters as its seconds."""
    return tuple(
        CellCost(name=cell.name, forward_seconds=size, backward_seconds=2 * size)
        for cell in chain_of(model)
        for size in [float(sum(p.numel() for p in cell.module.parameters()))]
    )


def num_samples_of(batch: Batch) -> int:
    """Return the number of samples in a minibatch; raise BatchError if there are none."""
    size = extent([("inputs", batch[0]), ("target", batch[1])]).num_samples
    if size is None:
        raise BatchError(
            "the recipe's batches contain no tensor with samples; put samples along dimension 0"
        )
    return size


def room_of(recipe: Recipe, chain: Chain, device: DeviceSpec | None, num_devices: int) -> Room:
    """Return the memory of a plan's devices: of `device`, or of this machine's if it is None."""
    kept = state_factor(recipe, chain)
    if device is None:
        memory = memory_here(num_devices)
        return Room(device="this machine's device", memory_bytes=memory, state_factor=kept)
    return Room(
        device=device.name,
        memory_bytes=device.memory_bytes,
        state_factor=kept,
        reserve=reserve_of("cpu" if device.name == "cpu" else "cuda", posts=True),
    )


def memory_here(num_devices: int) -> int:
    """Return the bytes that each of a plan's devices may use here: of its GPU, or of the machine.

    Devices that share a GPU share its memory; the smallest share counts.
    """
    gpus = devices_here(num_devices) if torch.cuda.is_available() else None
    if gpus is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_devices
    shares = Counter(gpus)
    return min(
        int(torch.cuda.get_device_properties(gpu).total_memory) // count
        for gpu, count in shares.items()
    )
