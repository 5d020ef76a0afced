"""Choose the devices and wires for a plan."""

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import TypeVar

import torch
import torch.distributed as dist

from stagewise.engine.transport.choose_wires import Seat, gathered, wires_between
from stagewise.engine.transport.local import LocalMailbox
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.processes import (
    are_ready,
    host_group,
    num_processes,
    own_device,
    timeout_of,
)
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.rendezvous import Rendezvous
from stagewise.engine.transport.transport import Transport
from stagewise.engine.transport.wires.group_wire import GroupWire, LinkGroups
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.sockets import Sockets
from stagewise.engine.transport.wires.wire import Wire, Wires
from stagewise.engine.watch.last_words import last_words, leave_for_launcher
from stagewise.engine.watch.now import NOW
from stagewise.engine.watch.watchdog import Watchdog
from stagewise.errors import PlanError
from stagewise.model.cell import Chain

Device = torch.device | str
_BUILDING = "Pipeline(...)"  # as other ranks hear of it
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
    wires, rendezvous = _connections(device, group, _BUILDING)
    return Transport(Mailbox(wires, device), Ranks(wires, rendezvous, device, group))


def trial_wire(device: torch.device) -> Wire:
    """Return a wire like a pipeline's on `device`, where it need not connect links first."""
    group = _whole(None)
    wires, rendezvous = _connections(device, group, "plan: links")
    is_direct = isinstance(wires.data, LinkGroups)
    return GroupWire(rendezvous.peers, group) if is_direct else wires.data


def values_of_all(value: T, what: str) -> list[T]:
    """Return every process's (picklable) value, by rank; collective, with the same `what`."""
    if num_processes() == 1:
        return [value]
    group = _whole(None)
    known = _CONNECTED.get(group)
    rendezvous = known.rendezvous if known else _connections(own_device(), group, what)[1]
    return rendezvous.gather(value, what)


def _whole(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    return group


@dataclass
class _Connected:
    """What this process keeps for a process group, whichever Pipelines come and go."""

    host: dist.ProcessGroup  # the same ranks, for the hosts' tensors
    rendezvous: Rendezvous
    watchdog: Watchdog
    wires: dict[tuple[Seat, ...], Wires]  # by where the ranks compute


# Pipelines and `plan` know nothing of each other, yet all calls in a group must be compared.
_CONNECTED: dict[dist.ProcessGroup, _Connected] = {}


def _connections(
    device: torch.device, group: dist.ProcessGroup, what: str
) -> tuple[Wires, Rendezvous]:
    """Return the wires and rendezvous of this process, connected on first use; collective."""
    known, own = _CONNECTED.get(group), Seat.of(device, group)
    if known is None:
        default = dist.distributed_c10d._get_default_store()
        store = dist.PrefixStore(group.group_name, default)  # type: ignore[attr-defined]
        peers = Peers(dist.get_rank(group), store)
        NOW.place = f"rank {peers.rank} on {socket.gethostname()}"
        host = host_group(group)
        seats = tuple(gathered(host, peers, own))
        wires = wires_between(seats, device, group, host, peers)
        for destroyed in _CONNECTED.keys() - dist.distributed_c10d._world.pg_map.keys():
            _CONNECTED.pop(destroyed).watchdog.stop()
        made = {seats: wires}

        def abort() -> None:
            for each in [*made.values()]:
                if each.abort is not None:
                    each.abort()

        with peers.named():
            watchdog = Watchdog(peers.rank, len(seats), store, timeout_of(host), abort=abort)
        rendezvous = Rendezvous(wires.control, peers)
        known = _CONNECTED[group] = _Connected(host, rendezvous, watchdog, made)
        # Also runs at the end of a multiprocessing process, which ignores atexit.
        Finalize(None, leave, exitpriority=0)
    else:
        seats = tuple(known.rendezvous.gather(own, what))
        if seats not in known.wires:
            peers = known.rendezvous.peers
            known.wires[seats] = wires_between(seats, device, group, known.host, peers)
    return known.wires[seats], known.rendezvous


def disconnect() -> None:
    """Close all connections of this process; call it before process groups are destroyed."""
    for group, connected in _CONNECTED.items():
        connected.watchdog.stop()
        for wires in connected.wires.values():
            for wire in {wires.data, wires.control}:
                wire.close()
        if connected.host is not group:
            dist.destroy_process_group(connected.host)
    _CONNECTED.clear()


def leave(error: BaseException | None = None) -> bool | None:
    """Tell ranks that wait for this one, and its launcher, that its program ends here.

    `error` is what ends it, if not sys.last_value. Returns whether it is the first failure of all
    ranks; None without connections.
    """
    error, is_first = error or getattr(sys, "last_value", None), None
    said = None if error is None else last_words(error)
    if error is not None and _CONNECTED:
        leave_for_launcher(error)
    for connected in _CONNECTED.values():
        rendezvous = connected.rendezvous
        is_first = said is not None and rendezvous.peers.tell(said)
        connected.watchdog.stop()
        rendezvous.leave(said)
    _CONNECTED.clear()
    return is_first


def _device_of(chain: Chain) -> torch.device:
    for cell in chain:
        for tensor in (*cell.module.parameters(), *cell.module.buffers()):
            return torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.device("cpu")
