"""The processes of torch.distributed, before they become ranks of a pipeline."""

import os

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
    """Return the device whose tensors this process exchanges: its accelerator, else the CPU.

    It is an accelerator if the process group has a backend for it, other than gloo, which only
    takes pointers of its memory. Its index is the one the group is bound to, or the current one;
    with the first one current, that of LOCAL_RANK.
    """
    group = dist.group.WORLD if are_ready() else None
    kind = torch.accelerator.current_accelerator(check_available=True)
    if group is None or kind is None or not _exchanges(group, kind):
        return torch.device("cpu")
    if group.bound_device_id is not None:
        return group.bound_device_id
    current, local = torch.accelerator.current_device_index(), os.environ.get("LOCAL_RANK", "")
    if current == 0 and local.isdigit() and int(local) < torch.accelerator.device_count():
        current = int(local)
        torch.accelerator.set_device_index(current)
    return torch.device(kind.type, current)


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


def _exchanges(group: dist.ProcessGroup, kind: torch.device) -> bool:
    """Return whether `group` has a backend for tensors of this kind of device."""
    known = {device.type for device in group._device_types}
    return kind.type in known and group._get_backend(kind).name() != "gloo"
