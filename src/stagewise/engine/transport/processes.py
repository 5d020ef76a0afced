"""The processes of torch.distributed, before a pipeline has made them its ranks."""

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def are_ready() -> bool:
    """Whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def num_processes() -> int:
    """How many there are; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if are_ready() else 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return not are_ready() or dist.get_rank() == 0


def values_of_all(value: T) -> list[T]:
    """Every process's picklable value, by rank; all of them call this."""
    values = [value] * num_processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def own_device() -> torch.device:
    """The one whose tensors torch.distributed sends: this process's GPU with NCCL, else the CPU."""
    if are_ready() and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
