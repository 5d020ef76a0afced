"""The processes of torch.distributed, before they become ranks of a pipeline."""

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def are_ready() -> bool:
    """Return whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def num_processes() -> int:
    """Return the world size; 1 if torch.distributed is not initialised."""
    return dist.get_world_size() if are_ready() else 1


def is_first() -> bool:
    """Return whether this process speaks for all."""
    return not are_ready() or dist.get_rank() == 0


def values_of_all(value: T) -> list[T]:
    """Return every process's (picklable) value, by rank; collective."""
    values = [value] * num_processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def own_device() -> torch.device:
    """Return the device whose tensors torch.distributed sends: with NCCL the GPU, else the CPU."""
    if are_ready() and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
