"""Choose the devices and wires for a plan."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stagewise.engine.transport.connect_sockets import Gather, connect_sockets
from stagewise.engine.transport.group_wire import GroupWire, LinkGroups
from stagewise.engine.transport.local import LocalMailbox
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.peers import Peers
from stagewise.engine.transport.processes import are_ready, num_processes, own_device
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.rendezvous import Rendezvous
from stagewise.engine.transport.sockets import Sockets
from stagewise.engine.transport.transport import Transport
from stagewise.engine.transport.wire import BySize, Wire, Wires
from stagewise.errors import PlanError
from stagewise.model.cell import Chain

Device = torch.device | str
# With these, a stream that waits holds up the others.
_BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
T = TypeVar("T")


def connect(
    transport: str,
    devices: Sequence[Device] | None,
    chain: Chain,
    num_devices: int,
    stage_devices: Sequence[int] = (0,),
) -> tuple[list[torch.device], Transport]:
    """Return the plan's devices and this rank's transport; PlanError if they do not fit.

    In one process, stage s is on device `stage_devices[s]`.
    """
    if transport not in ("auto", "local", "distributed"):
        raise PlanError(f"transport is {transport!r}; choose 'auto', 'local' or 'distributed'")
    if devices is not None and len(devices) != num_devices:
        raise PlanError(
            f"got {len(devices)} devices for a plan of {num_devices}; name one for each"
        )
    if transport == "distributed" and not are_ready():
        raise PlanError(
            "transport 'distributed' needs torch.distributed: start the script with torchrun and "
            "call torch.distributed.init_process_group() first"
        )
    if transport == "local" or num_processes() == 1:
        own = [torch.device(d) for d in devices or [_device_of(chain)] * num_devices]
        return own, in_one_process([own[device] for device in stage_devices])
    if num_processes() != num_devices:
        raise PlanError(
            f"the plan needs {num_devices} ranks, one per device, but {num_processes()} are "
            f"running; start torchrun with --nproc-per-node {num_devices}, or plan "
            f"for {num_processes()} devices"
        )
    own = [torch.device(d) for d in devices or [own_device()] * num_devices]
    return own, between_processes(own[dist.get_rank()])


def in_one_process(devices: Sequence[torch.device]) -> Transport:
    """Return the transport of a process that runs every stage, stage s on `devices[s]`."""
    wire = Sockets(Peers(0), 1, {}, timedelta())  # a single rank, which sends itself nothing
    ranks = Ranks(Wires(wire, wire), Rendezvous(wire, Peers(0)), devices[-1])
    return Transport(LocalMailbox(devices), ranks)


def between_processes(device: torch.device, group: dist.ProcessGroup | None = None) -> Transport:
    """Return this rank's transport, its stage on `device`; collective over `group`."""
    group = _whole(group)
    wires, rendezvous = _connections(device, group)
    return Transport(Mailbox(wires, device), Ranks(wires, rendezvous, device, group))


def trial_wire() -> Wire:
    """Return a wire like a pipeline's data wire, but without creating process groups."""
    group = _whole(None)
    wires, rendezvous = _connections(own_device(), group)
    return wires.data if own_device().type == "cpu" else GroupWire(rendezvous.peers, group)


def values_of_all(value: T, what: str) -> list[T]:
    """Return every process's (picklable) value, by rank; collective, with the same `what`."""
    if num_processes() == 1:
        return [value]
    return _connections(own_device(), _whole(None))[1].gather(value, what)


def _whole(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    return group


@dataclass
class _Connected:
    """What this process keeps for a process group, whichever Pipelines come and go."""

    rendezvous: Rendezvous
    wires: dict[torch.device, Wires]


# Pipelines and `plan` know nothing of each other, yet all calls in a group must be compared.
_CONNECTED: dict[dist.ProcessGroup, _Connected] = {}


def _connections(device: torch.device, group: dist.ProcessGroup) -> tuple[Wires, Rendezvous]:
    """Return the wires and rendezvous of this process, connected on first use; collective."""
    known = _CONNECTED.get(group)
    wires = None if known is None else known.wires.get(device)
    if known is None or wires is None:
        peers = Peers(dist.get_rank(group), dist.distributed_c10d._get_default_store())
        wires = wires_for(device, group, peers)
        if known is None:
            for destroyed in _CONNECTED.keys() - dist.distributed_c10d._world.pg_map.keys():
                del _CONNECTED[destroyed]
            _CONNECTED[group] = known = _Connected(Rendezvous(wires.control, peers), {})
            # Also runs at the end of a multiprocessing process, which ignores atexit.
            Finalize(None, _leave, exitpriority=0)
        known.wires[device] = wires
    return wires, known.rendezvous


def disconnect() -> None:
    """Close all connections of this process; call it before process groups are destroyed."""
    for connected in _CONNECTED.values():
        for wires in connected.wires.values():
            for wire in {wires.data, wires.control}:
                wire.close()
    _CONNECTED.clear()


def _leave() -> None:
    """Tell ranks that wait for this one that its program ends here."""
    error = getattr(sys, "last_value", None)
    for connected in _CONNECTED.values():
        connected.rendezvous.leave("" if error is None else f" ({type(error).__name__}: {error})")
    _CONNECTED.clear()


def wires_for(device: torch.device, group: dist.ProcessGroup, peers: Peers) -> Wires:
    """On CPUs small tensors go through sockets; GPUs use a group a link, gloo for control."""
    if device.type != "cpu":
        _check_streams(device)
        data = LinkGroups(peers, group, device)
        ranks = dist.get_process_group_ranks(group)
        gloo = dist.new_group(ranks, backend="gloo", timeout=data.timeout)
        _check_own(device, partial(_gathered, gloo, peers))
        control = GroupWire(peers, gloo, owned=True)
        return Wires(data, control, prepare=data.prepare)
    timeout = group._get_backend(device).options._timeout
    sockets, limits = connect_sockets(peers, partial(_gathered, group, peers), timeout)
    wire = BySize(sockets, GroupWire(peers, group), limits)
    return Wires(wire, wire, sockets)


def _device_of(chain: Chain) -> torch.device:
    for cell in chain:
        for tensor in (*cell.module.parameters(), *cell.module.buffers()):
            return torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.device("cpu")


def _gathered(group: dist.ProcessGroup, peers: Peers, value: object) -> list[Any]:
    """Return every rank's value, before there is a rendezvous."""
    values = [value] * dist.get_world_size(group)
    with peers.named():
        dist.all_gather_object(values, value, group=group)
    return values


def _check_own(device: torch.device, gather: Gather) -> None:
    """Raise PlanError on every rank if two ranks have the same device."""
    properties = torch.get_device_module(device).get_device_properties(device)
    everyone = gather((socket.gethostname(), str(getattr(properties, "uuid", device))))
    for rank, place in enumerate(everyone):
        if (first := everyone.index(place)) < rank:
            raise PlanError(
                f"ranks {first} and {rank} are both on {device.type.upper()} {place[1]} of "
                f"{place[0]}, which cannot send to itself; call "
                "torch.accelerator.set_device_index(int(os.environ['LOCAL_RANK'])) before "
                "init_process_group, and start one rank per device"
            )


def _check_streams(device: torch.device) -> None:
    """Raise PlanError if the environment makes streams of `device` wait for each other."""
    for name, value in _BLOCKING.items():
        if device.type == "cuda" and os.environ.get(name) == value:
            raise PlanError(
                f"{name}={value} lets a stream that waits for a message hold up all others of its "
                "GPU, so that ranks would wait for each other for ever; unset it, or run all "
                "stages in one process (transport='local')"
            )
