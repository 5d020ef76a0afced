"""The processes of torch.distributed, before they become ranks of a pipeline."""

import torch
import torch.distributed as dist


def are_ready() -> bool:
    """Return whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def num_processes() -> int:
    """Return the world size; 1 if torch.distributed is not initialised."""
    return dist.get_world_size() if are_ready() else 1


def is_first() -> bool:
    """Return whether this process speaks for all."""
    return not are_ready() or dist.get_rank() == 0


def own_device() -> torch.device:
    """Return the device whose tensors torch.distributed sends: with NCCL the GPU, else the CPU."""
    if are_ready() and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
