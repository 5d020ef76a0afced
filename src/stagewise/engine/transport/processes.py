"""The processes of torch.distributed, before they become ranks of a pipeline."""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from stagewise.engine.transport.wires.new_group import new_group
from stagewise.errors import PlanError
from stagewise.model.cell import Chain


def are_ready() -> bool:
    """Return whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def num_processes() -> int:
    """Return the world size; 1 if torch.distributed is not initialised."""
    return dist.get_world_size() if are_ready() else 1


def own_rank() -> int:
    """Return the rank of this process; 0 if torch.distributed is not initialised."""
    return dist.get_rank() if are_ready() else 0


def is_first() -> bool:
    """Return whether this process speaks for all."""
    return own_rank() == 0


def own_device() -> torch.device:
    """Return the device whose tensors this process exchanges: its accelerator, else the CPU.

    It is an accelerator if the process group has a backend for it, other than gloo. Its index is
    the one the group is bound to, or the current one; with the first one current, that of
    LOCAL_RANK, which counts on from the first again where ranks share devices.
    """
    group = dist.group.WORLD if are_ready() else None
    kind = torch.accelerator.current_accelerator(check_available=True)
    if group is None or kind is None or not sends_from(group, kind):
        return torch.device("cpu")
    if group.bound_device_id is not None:
        return group.bound_device_id
    current, local = torch.accelerator.current_device_index(), os.environ.get("LOCAL_RANK", "")
    if current == 0 and local.isdigit():
        current = int(local) % torch.accelerator.device_count()
        torch.accelerator.set_device_index(current)
    return torch.device(kind.type, current)


def named_devices(devices: Sequence[torch.device | str], num_devices: int) -> list[torch.device]:
    """Return a plan's devices; PlanError if they are not as many, or one is not here."""
    if isinstance(devices, str):
        raise PlanError(f"devices is {devices!r}; give a list of {num_devices}, one for each")
    if len(devices) != num_devices:
        raise PlanError(
            f"got {len(devices)} devices for a plan of {num_devices}; name one for each"
        )
    return [named_device(device) for device in devices]


def named_device(device: torch.device | str) -> torch.device:
    """Return the device of that name; PlanError if there is none here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise PlanError(f"{device!r} is no device; write 'cpu', or 'cuda:0' for a GPU") from None
    if found.type in ("cuda", "mps", "xpu"):
        kind = torch.accelerator.current_accelerator(check_available=True)
        here = torch.accelerator.device_count() if kind and kind.type == found.type else 0
        if (found.index or 0) >= here:
            raise PlanError(
                f"there is no device {device} here: torch sees {here} of this kind; name others "
                "(stagewise doctor tells what there is), or leave devices out"
            )
    return found


def device_of(chain: Chain) -> torch.device:
    """Return where a model's values are; the CPU if it has none."""
    for cell in chain:
        for tensor in (*cell.module.parameters(), *cell.module.buffers()):
            return torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.device("cpu")


def accelerators() -> list[torch.device]:
    """Return this machine's accelerators, in order, if processes could exchange their tensors."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or dist.get_default_backend_for_device(kind) == "gloo":
        return []
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def devices_here(num_devices: int) -> list[torch.device] | None:
    """Return where one process runs each of a plan's devices: on the accelerators, in turn.

    None on a machine without any, and if each device has a process of its own.
    """
    found = accelerators()
    if not found or num_processes() > 1:
        return None
    return [found[device * len(found) // num_devices] for device in range(num_devices)]


def sends_from(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether `group` sends tensors from this kind of device.

    Gloo takes pointers of an accelerator's memory for the host's.
    """
    if device.type not in {known.type for known in group._device_types}:
        return False
    return device.type == "cpu" or group._get_backend(device).name() != "gloo"


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Return how long `group` waits for its ranks."""
    timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return timeout


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a group of the same ranks for the hosts' tensors: `group`, or a new one."""
    if sends_from(group, torch.device("cpu")):
        return group
    ranks = dist.get_process_group_ranks(group)
    return part_of(group, ranks, timeout_of(group), backend="gloo")


def part_of(
    group: dist.ProcessGroup, ranks: Sequence[int], timeout: timedelta, backend: str | None = None
) -> dist.ProcessGroup:
    """Return a new group of some of the `ranks` of the world; collective over `group`.

    Beside a group that is itself a part of the world, others may make groups of their own.
    """
    made = new_group(ranks, timeout, backend, apart=group is not dist.group.WORLD)
    assert made is not None
    return made
