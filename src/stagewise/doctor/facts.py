"""What one rank sees of its host: software, memory, limits, accelerators."""

import os
import platform
import shutil
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import permutations
from pathlib import Path

import torch

from stagewise.engine.transport.processes import accelerators, own_device
from stagewise.training.workers.environment import num_cores

PACKAGES = "torch", "stagewise", "transformers"
_SHARED_MEMORY = Path("/dev/shm")
_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
_USED = Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """A rank's host. None: the system does not tell, or there is none."""

    host: str
    device: str
    versions: dict[str, str]
    num_cores: int
    memory_bytes: int | None
    free_memory_bytes: int | None
    shared_memory_bytes: int | None
    free_shared_memory_bytes: int | None
    open_files: int | None
    temporary_folder: str
    free_temporary_bytes: int | None
    accelerators: list[str]
    without_peer_access: list[tuple[int, int]]
    nccl: str | None


def facts_here() -> HostFacts:
    """Return what this process sees."""
    memory, free = _memory()
    shared, folder = _disk(_SHARED_MEMORY), tempfile.gettempdir()
    temporary = _disk(Path(folder))
    found = accelerators()
    return HostFacts(
        host=socket.gethostname(),
        device=str(own_device()),
        versions=_versions(),
        num_cores=num_cores(),
        memory_bytes=memory,
        free_memory_bytes=free,
        shared_memory_bytes=shared and shared[0],
        free_shared_memory_bytes=shared and shared[1],
        open_files=_open_files(),
        temporary_folder=folder,
        free_temporary_bytes=temporary and temporary[1],
        accelerators=[_named(device) for device in found],
        without_peer_access=_without_peer_access(found),
        nccl=_nccl_version(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _memory() -> tuple[int | None, int | None]:
    """Return the host's memory and how much is free, or a container's if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None, None
    for limit, used in zip(_LIMITS, _USED, strict=True):
        with suppress(OSError, ValueError):  # "max", or no such group
            allowed = int(limit.read_text(encoding="ascii"))
            total, left = min(total, allowed), allowed - int(used.read_text(encoding="ascii"))
            free = min(free, left)
    return total, free


def _disk(path: Path) -> tuple[int, int] | None:
    try:
        found = shutil.disk_usage(path)
    except OSError:
        return None
    return found.total, found.free


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _named(device: torch.device) -> str:
    module = torch.get_device_module(device)
    try:
        return f"{device} {module.get_device_name(device)}"
    except (AttributeError, RuntimeError):
        return str(device)


def _without_peer_access(devices: list[torch.device]) -> list[tuple[int, int]]:
    """Return the pairs of GPUs of this host of which the first cannot read the second's memory."""
    gpus = [device.index for device in devices if device.type == "cuda"]
    return [pair for pair in permutations(gpus, 2) if not torch.cuda.can_device_access_peer(*pair)]


def _nccl_version() -> str | None:
    try:
        numbers: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    except AttributeError:  # built without it
        return None
    return ".".join(map(str, numbers))


def path_length(folder: str) -> int:
    """Return the length of a socket's path in the temporary folder `folder`."""
    return len(os.fsencode(folder)) + len("/stagewise-12345678/socket")
