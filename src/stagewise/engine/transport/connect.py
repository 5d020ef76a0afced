"""Choosing devices and transport for a plan, and checking that all ranks build the same thing."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from stagewise.engine.transport.distributed import DistributedTransport
from stagewise.engine.transport.transport import LocalTransport, Transport
from stagewise.errors import PlanError
from stagewise.model.cell import Chain

Device = torch.device | str


def connect(
    transport: str,
    devices: Sequence[Device] | None,
    chain: Chain,
    num_devices: int,
    homes: Sequence[int] = (0,),
) -> tuple[list[torch.device], Transport]:
    """The plan's devices and this rank's transport; raises PlanError if they do not fit.

    Under the local transport stage s is on device `homes[s]`.
    """
    if transport not in ("auto", "local", "distributed"):
        raise PlanError(f"transport is {transport!r}; choose 'auto', 'local' or 'distributed'")
    if devices is not None and len(devices) != num_devices:
        raise PlanError(
            f"got {len(devices)} devices for a plan of {num_devices}; name one for each"
        )
    ready = dist.is_available() and dist.is_initialized()
    if transport == "distributed" and not ready:
        raise PlanError(
            "transport 'distributed' needs torch.distributed: start the script with torchrun and "
            "call torch.distributed.init_process_group() first"
        )
    if transport == "local" or not ready or dist.get_world_size() == 1:
        own = [torch.device(d) for d in devices or [_home(chain)] * num_devices]
        return own, LocalTransport([own[device] for device in homes])
    if dist.get_world_size() != num_devices:
        raise PlanError(
            f"the plan needs {num_devices} ranks, one per device, but {dist.get_world_size()} "
            f"run; start torchrun with --nproc-per-node {num_devices}, or plan "
            f"for {dist.get_world_size()} devices"
        )
    if devices is None:
        uses_gpu = "nccl" in str(dist.get_backend())
        own_device = (
            torch.device("cuda", torch.cuda.current_device()) if uses_gpu else torch.device("cpu")
        )
        own = [own_device] * num_devices
    else:
        own = [torch.device(d) for d in devices]
    return own, DistributedTransport(own[dist.get_rank()])


def _home(chain: Chain) -> torch.device:
    for cell in chain:
        for tensor in (*cell.module.parameters(), *cell.module.buffers()):
            return torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.device("cpu")
