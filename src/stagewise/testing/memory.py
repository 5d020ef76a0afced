"""Count what is alive: activations of a pipeline, and tensors of the process."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import is_fake

from stagewise.batch.values import take_apart
from stagewise.engine.stage.activation_meter import ActivationMeter
from stagewise.pipeline.pipeline import Pipeline


@contextmanager
def live_activation_bytes(pipe: Pipeline, *ignored: object) -> Iterator[Callable[[], int]]:
    """Yield a function that returns how many bytes this rank currently keeps for the backward.

    Counts what autograd saves inside the context, on any device, each storage once, without
    parameters, buffers and tensors of the pytrees `ignored` (such as the batch).

    Example:
        >>> import torch, stagewise
        >>> from stagewise.testing import live_activation_bytes
        >>> plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
        >>> cells = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
        >>> pipe = stagewise.Pipeline(cells, plan, loss=torch.nn.functional.mse_loss)
        >>> with live_activation_bytes(pipe) as live:
        ...     _ = pipe.step(torch.ones(4, 4), target=torch.ones(4, 1))
        ...     live()
        0
    """
    own = [*pipe.parameters(), *pipe.module.buffers()]
    meter = ActivationMeter([*own, *take_apart(list(ignored))[0]])
    with meter.counting():
        yield lambda: meter.live_bytes([])


@dataclass(frozen=True, kw_only=True)
class LiveTensors:
    """The number of tensors that Python can reach, and the bytes of their distinct storages."""

    number: int
    num_bytes: int


def live_tensors() -> LiveTensors:
    """Count every tensor of this process that has values, after garbage collection."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    found = [tensor for tensor in tensors if not is_fake(tensor)]
    storages = {
        (tensor.device, storage.data_ptr()): storage.nbytes()
        for tensor in found
        if tensor.layout is torch.strided and tensor.device.type != "meta"
        for storage in [tensor.untyped_storage()]
    }
    return LiveTensors(number=len(found), num_bytes=sum(storages.values()))
