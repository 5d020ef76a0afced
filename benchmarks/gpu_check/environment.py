"""What the machine is: versions, GPUs, and what torch.distributed would register on it."""

import os
import platform

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.supervise import Say

VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES")


def env(dry: bool, say: Say) -> None:
    """Print what a reader of the other figures needs to know."""
    machine = Machine.here(dry)
    registered = BackendConfig(dist.Backend(dist.Backend.UNDEFINED)).get_device_backend_map()
    say(
        "machine",
        torch=torch.__version__,
        python=platform.python_version(),
        cores=os.cpu_count(),
        backends=registered,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )
    if machine.device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info()
    count = torch.cuda.device_count()
    say(
        "GPUs",
        names=[torch.cuda.get_device_name(index) for index in range(count)],
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=torch.cuda.nccl.version() if dist.is_nccl_available() else None,
        free_gib=free / 2**30,
        total_gib=total / 2**30,
        peers=[
            [a != b and torch.cuda.can_device_access_peer(a, b) for b in range(count)]
            for a in range(count)
        ],
    )
