"""`stagewise.estimate`: the costs of a model on a device that need not be present.

Idea: run every cell, forward and backward, on tensors without memory, and count FLOPs and bytes;
a device's published figures turn them into seconds. Equal cells with equal inputs are run once, so
a thousand layers take no longer than one. The bytes equal those that `stagewise.plan` measures on a
CPU.
"""

from collections.abc import Mapping

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.markers import Arguments
from stagewise.batch.split import extent, first_microbatch, microbatch_sizes, split
from stagewise.costs import CellCost, without_gradients
from stagewise.engine.stage.loss import Loss
from stagewise.engine.stage.randomness import generators_kept
from stagewise.engine.step.admission import positional
from stagewise.errors import BatchError
from stagewise.model.cells_of import chain_for, entering
from stagewise.model.chain import Model
from stagewise.planning.devices import DeviceSpec, device_named, load_devices
from stagewise.planning.roofline import CellWork
from stagewise.profiling.estimate_cell import CPU, Batch
from stagewise.profiling.estimate_chain import Walk
from stagewise.profiling.fakes import fake_like, fake_mode


def estimate(
    model: Model,
    inputs: object = None,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    num_microbatches: int,
    device: str | DeviceSpec,
) -> tuple[CellCost, ...]:
    """Estimate what every cell of `model` costs on `device`, for one microbatch.

    Nothing is allocated: model and batch may be on the meta device (build the model inside
    `with torch.device("meta")`). Under `torch.autocast("cpu", dtype=...)` the estimate assumes
    autocast on any device.

    Args:
        model, inputs, target, kwargs, loss: as for `stagewise.plan`; only the shapes and dtypes of
            the example batch matter.
        num_microbatches: the number of microbatches per batch.
        device: a name in stagewise's catalogue, or a device from
            `stagewise.planning.load_devices`, which can read your own.

    Raises:
        DeviceError: there is no such device.
        ModelError: a cell needs values, or has an operator that cannot run on shapes alone.
        BatchError: the example has fewer samples than microbatches.

    Example:
        >>> import torch, stagewise
        >>> from stagewise.planning import plan_from_costs
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(*(torch.nn.Linear(8192, 8192) for _ in range(96)))
        ...     inputs = torch.empty(4096, 8192)
        >>> cells = stagewise.estimate(model, inputs, loss=lambda output: output.mean(),
        ...                            num_microbatches=32, device="h100")
        >>> plan_from_costs(cells, num_stages=8, num_microbatches=32).balance
        (12, 12, 12, 12, 12, 12, 12, 12)
    """
    spec = device if isinstance(device, DeviceSpec) else device_named(device, load_devices())
    work = cell_work(
        model,
        inputs,
        target=target,
        kwargs=kwargs,
        loss=loss,
        num_microbatches=num_microbatches,
    )
    return without_gradients([cell.cost(spec) for cell in work])


def cell_work(
    model: Model,
    inputs: object = None,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    num_microbatches: int,
) -> tuple[CellWork, ...]:
    """Return FLOPs and bytes of every cell for one microbatch, for any device; see `estimate`."""
    chain = chain_for(model, inputs, kwargs or {})
    inputs, keywords = entering(model, inputs, kwargs or {})
    batch = extent([("inputs", inputs), ("target", target), *keywords.items()])
    if batch.num_samples is None:
        raise BatchError(
            "nothing in the example has samples; pass tensors with samples along dimension 0"
        )
    size = (batch.sizes or microbatch_sizes(batch.num_samples, num_microbatches))[0]
    first = first_microbatch((inputs, target, keywords), size)
    with generators_kept([CPU]), fake_mode(), torch.device("cpu"):
        known: dict[int, torch.Tensor] = {}
        faked = pytree.tree_map_only(
            torch.Tensor, lambda t: known.setdefault(id(t), fake_like(t.detach())), first
        )
        inputs, target, keywords = split(faked, [size])[0]  # type: ignore[misc]
        walk = Walk(
            chain,
            Batch(
                inputs=Arguments() if inputs is None else inputs,
                target=target,
                keywords=keywords,
                num_samples=size,
                num_args=positional(inputs),
            ),
            loss,
        )
        for cell in chain:
            walk.forward(cell)
        for cell in reversed(chain):
            walk.backward(cell)
        return walk.work()
