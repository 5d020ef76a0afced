"""Choose the wires between ranks by where they compute.

CPUs, and hosts among each other, use sockets for small tensors and gloo for large ones.
Accelerators, each with one rank, use the backend of their process group, such as NCCL. Whatever
else there is goes through the hosts' memory: ranks that share a device, kinds of devices that have
no such backend, CPUs among GPUs.
"""

import os
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from stagewise.engine.transport.processes import part_of, sends_from, timeout_of
from stagewise.engine.transport.wires.connect_sockets import connect_sockets
from stagewise.engine.transport.wires.group_wire import GroupWire, LinkGroups
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.staged import staged
from stagewise.engine.transport.wires.wire import BySize, Wires
from stagewise.errors import PlanError
from stagewise.model.forward.users_code import warn_user

# With these, a stream that waits holds up the others.
_BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


class Seat(NamedTuple):
    """Where a rank computes."""

    host: str
    kind: str
    device: str  # its UUID if it has one
    sends: bool  # whether the process group sends from there

    @staticmethod
    def of(device: torch.device, group: dist.ProcessGroup) -> "Seat":
        """Return this rank's."""
        named = str(device)
        if device.type != "cpu":
            module = torch.get_device_module(device)
            if hasattr(module, "get_device_properties"):
                named = str(getattr(module.get_device_properties(device), "uuid", device))
        return Seat(socket.gethostname(), device.type, named, sends_from(group, device))


def wires_between(
    seats: Sequence[Seat],
    device: torch.device,
    group: dist.ProcessGroup,
    host: dist.ProcessGroup,
    peers: Peers,
) -> Wires:
    """Connect the ranks of `group`, this one on `device`; collective.

    `host` has the same ranks and exchanges the hosts' tensors.
    """
    if why := why_staged(seats):
        ranks = dist.get_process_group_ranks(group)
        own = part_of(group, ranks, timeout_of(host), backend="gloo")
        wires = staged(_between_hosts(own, peers, owned=True), device)
        if peers.rank == 0:
            warn_user(f"all messages between ranks go through the hosts' memory, since {why}")
        return wires
    if device.type == "cpu":
        return _between_hosts(host, peers)
    _check_streams(device)
    data, near = LinkGroups(peers, group, device), _between_hosts(host, peers)
    return Wires(
        data, near.control, prepare=data.prepare, abort=data.abort, interrupt=near.interrupt
    )


def why_staged(seats: Sequence[Seat]) -> str | None:
    """Return why these ranks cannot send from device to device, or None."""
    kinds = sorted({seat.kind for seat in seats})
    if kinds == ["cpu"]:
        return None
    if len(kinds) > 1:
        return f"they compute on devices of several kinds: {', '.join(kinds)}"
    if not all(seat.sends for seat in seats):
        return f"the process group has no backend, such as NCCL, that sends from {kinds[0]} devices"
    places = [(seat.host, seat.device) for seat in seats]
    for rank, place in enumerate(places):
        if (first := places.index(place)) < rank:
            return (
                f"ranks {first} and {rank} share {kinds[0]} device {place[1]} of {place[0]}; if "
                "each is to have its own, call torch.accelerator.set_device_index before "
                "init_process_group"
            )
    return None


def gathered(group: dist.ProcessGroup, peers: Peers, value: object) -> list[Any]:
    """Return every rank's value, before there is a rendezvous."""
    values = [value] * dist.get_world_size(group)
    with peers.named():
        dist.all_gather_object(values, value, group=group)
    return values


def _between_hosts(group: dist.ProcessGroup, peers: Peers, *, owned: bool = False) -> Wires:
    gather = partial(gathered, group, peers)
    sockets, limits = connect_sockets(peers, gather, timeout_of(group))
    wire = BySize(sockets, GroupWire(peers, group, owned=owned), limits)
    return Wires(wire, wire, sockets, interrupt=sockets.interrupt)


def _check_streams(device: torch.device) -> None:
    """Raise PlanError if the environment makes streams of `device` wait for each other."""
    for name, value in _BLOCKING.items():
        if device.type == "cuda" and os.environ.get(name) == value:
            raise PlanError(
                f"{name}={value} lets a stream that waits for a message hold up all others of its "
                "GPU, so that ranks would wait for each other for ever; unset it, or run all "
                "stages in one process (transport='local')"
            )
