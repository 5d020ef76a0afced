"""Choose the devices and wires for a plan."""

import gc
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.util import Finalize
from typing import TypeVar

import torch
import torch.distributed as dist

from stagewise.engine.transport.choose_wires import Seat, gathered, wires_between
from stagewise.engine.transport.device_mesh import HereOnMesh, OnMesh
from stagewise.engine.transport.failure import let_go
from stagewise.engine.transport.local import LocalMailbox, WatchedMailbox
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.processes import (
    are_ready,
    device_of,
    host_group,
    named_devices,
    num_processes,
    own_device,
    timeout_of,
)
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.rendezvous import Rendezvous
from stagewise.engine.transport.side_group import SideGroup
from stagewise.engine.transport.transport import Transport
from stagewise.engine.transport.wires.group import Group
from stagewise.engine.transport.wires.group_wire import GroupWire, LinkGroups
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.sockets import Sockets
from stagewise.engine.transport.wires.wire import Wire, Wires
from stagewise.engine.watch.collectives import run_on_devices
from stagewise.engine.watch.last_words import is_another_s, last_words, leave_for_launcher
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
    on: OnMesh | None = None,
) -> tuple[list[torch.device], Transport]:
    """Return the plan's devices and this rank's transport; PlanError if they do not fit.

    In one process, stage s is on device `stage_devices[s]`. `on` a mesh, every pipeline has
    `num_devices` ranks.
    """
    if transport not in ("auto", "local", "distributed"):
        raise PlanError(f"transport is {transport!r}; choose 'auto', 'local' or 'distributed'")
    named = None if devices is None else named_devices(devices, num_devices)
    if transport == "distributed" and not are_ready():
        raise PlanError(
            "transport 'distributed' needs torch.distributed: start the script with torchrun and "
            "call torch.distributed.init_process_group() first"
        )
    if on is not None:
        here = on.checked(transport, num_devices)
        own = named or [own_device()] * num_devices
        return own, _side_by_side(own, stage_devices, here)
    if transport == "local" or num_processes() == 1:
        own = named or [device_of(chain)] * num_devices
        return own, in_one_process([own[device] for device in stage_devices])
    if num_processes() != num_devices:
        raise PlanError(
            f"the plan needs {num_devices} ranks, one per device, but {num_processes()} are "
            f"running; start torchrun with --nproc-per-node {num_devices}, or plan "
            f"for {num_processes()} devices; to run several such pipelines side by side, give "
            "mesh="
        )
    own = named or [own_device()] * num_devices
    return own, between_processes(own[dist.get_rank()])


def in_one_process(devices: Sequence[torch.device]) -> Transport:
    """Return the transport of a process that runs every stage, stage s on `devices[s]`."""
    alone = Peers(0)  # a single rank, which sends itself nothing
    wire = Sockets(alone, 1, {}, timedelta())
    ranks = Ranks(Wires(wire, wire), Rendezvous(wire, alone), devices[-1])
    return Transport(LocalMailbox(devices), ranks)


def between_processes(device: torch.device, group: dist.ProcessGroup | None = None) -> Transport:
    """Return this rank's transport, its stage on `device`; collective over `group`."""
    group = _whole(group)
    wires, rendezvous = _connections(device, group, _BUILDING)
    return Transport(Mailbox(wires, device), Ranks(wires, rendezvous, device, group))


def _side_by_side(
    devices: Sequence[torch.device], stage_devices: Sequence[int], here: HereOnMesh
) -> Transport:
    """Return this rank's transport on a mesh; collective over its ranks."""
    slices = here.slices
    if len(slices.seatings) == 1:
        return in_one_process([devices[d] for d in stage_devices])
    device = devices[slices.seat.stage]
    wires, rendezvous = _connections(device, here.everyone, _BUILDING)
    if len(slices.seatings) == len(slices.own):  # a single pipeline
        return Transport(Mailbox(wires, device), Ranks(wires, rendezvous, device, here.everyone))
    rendezvous.finishes = True
    NOW.numbers = slices.own
    if len(slices.own) == 1:
        alone = Sockets(Peers(0), 1, {}, timedelta())
        ranks = Ranks(Wires(alone, alone), rendezvous, device, here.everyone, slices)
        return Transport(WatchedMailbox([devices[d] for d in stage_devices]), ranks)
    within = wires_within(device, here.pipeline, rendezvous.peers, slices.own)
    ranks = Ranks(within, rendezvous, device, here.everyone, slices)
    return Transport(Mailbox(within, device), ranks)


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
    rendezvous = (known.rendezvous if known else None) or _connections(own_device(), group, what)[1]
    return rendezvous.gather(value, what)


def _whole(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    return group


@dataclass
class _Connected:
    """What this process keeps for a process group, whichever Pipelines come and go."""

    host: dist.ProcessGroup  # the same ranks, for the hosts' tensors
    peers: Peers
    wires: dict[tuple[Seat, ...], Wires]  # by where the ranks compute
    rendezvous: Rendezvous | None = None
    watchdog: Watchdog | None = None

    def leave(self, why: str | None) -> None:
        """End the watchdog's thread, and tell ranks that wait for this one."""
        if self.watchdog is not None:
            self.watchdog.stop()
        if self.rendezvous is not None:
            self.rendezvous.leave(why)


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
        NOW.place = f"rank {dist.get_rank(group)} on {socket.gethostname()}"
        known, wires = _met(device, group, Peers(dist.get_rank(group), store))
        with known.peers.named():
            watched = known.peers.rank, dist.get_world_size(group), store, timeout_of(known.host)
            how = partial(_end_transfers, known), partial(_interrupt, known)
            known.watchdog = Watchdog(*watched, NOW, *how)
        known.rendezvous = Rendezvous(wires.control, known.peers)
        # Also runs at the end of a multiprocessing process, which ignores atexit.
        Finalize(None, leave, exitpriority=0)
        return wires, known.rendezvous
    assert known.rendezvous is not None, "a part of a mesh has none of its own"
    seats = tuple(known.rendezvous.gather(own, what))
    return _wires(known, seats, device, group), known.rendezvous


def _interrupt(known: _Connected) -> None:
    """Let this rank's waits for the others of a group raise, and kernels end that wait for them."""
    known.peers.is_over = True
    _end_transfers(known, "interrupt")
    if run_on_devices():
        dist.distributed_c10d._abort_process_group()


def _end_transfers(known: _Connected, how: str = "abort") -> None:
    """Give up what is in flight between the ranks of a group, also in parts of it."""
    parts = [other for other in [*_CONNECTED.values()] if other.watchdog is None]
    for end in [getattr(w, how) for one in (known, *parts) for w in [*one.wires.values()]]:
        if end is not None:
            end()


def wires_within(
    device: torch.device, group: dist.ProcessGroup, all_ranks: Peers, numbers: Sequence[int]
) -> Wires:
    """Return the wires of one of the pipelines on a mesh, among whose ranks it has `numbers`.

    It has no rendezvous and no watchdog of its own. Collective over `group`.
    """
    known = _CONNECTED.get(group)
    if known is None:
        return _met(device, group, Peers(dist.get_rank(group), all_ranks.store, numbers))[1]
    seats = tuple(gathered(known.host, known.peers, Seat.of(device, group)))
    return _wires(known, seats, device, group)


def _met(device: torch.device, group: dist.ProcessGroup, peers: Peers) -> tuple[_Connected, Wires]:
    """Connect with the others of `group` for the first time."""
    host = host_group(group)
    seats = tuple(gathered(host, peers, Seat.of(device, group)))
    wires = wires_between(seats, device, group, host, peers)
    for destroyed in _CONNECTED.keys() - dist.distributed_c10d._world.pg_map.keys():
        if (watchdog := _CONNECTED.pop(destroyed).watchdog) is not None:
            watchdog.stop()
    known = _CONNECTED[group] = _Connected(host, peers, {seats: wires})
    return known, wires


def _wires(
    known: _Connected, seats: tuple[Seat, ...], device: torch.device, group: dist.ProcessGroup
) -> Wires:
    if seats not in known.wires:
        known.wires[seats] = wires_between(seats, device, group, known.host, known.peers)
    return known.wires[seats]


def disconnect() -> None:
    """Close all connections of this process; call it before process groups are destroyed."""
    for group, connected in _CONNECTED.items():
        if connected.watchdog is not None:
            connected.watchdog.stop()
        for wires in connected.wires.values():
            for wire in {wires.data, wires.control}:
                wire.close()
        if connected.host is not group:
            dist.destroy_process_group(connected.host)
    _CONNECTED.clear()


def give_up(error: BaseException) -> None:
    """Give up all connections and groups in a call that has raised `error`; who waits fails too."""
    let_go(error)
    Group.give_up()
    SideGroup.give_up()
    disconnect()
    if dist.is_initialized():  # not where another rank was lost while the group was formed
        dist.distributed_c10d._abort_process_group()
    gc.collect()


def leave(error: BaseException | None = None) -> bool | None:
    """Tell ranks that wait for this one, and its launcher, that its program ends here.

    `error` is what ends it, if not sys.last_value. Returns whether it is the first failure of all
    ranks, which one that reports another's never is; None without connections.
    """
    at_exit, is_first = error is None, None
    error = error or getattr(sys, "last_value", None)
    said = None if error is None else last_words(error)
    if error is not None and _CONNECTED:
        leave_for_launcher(error)
    for connected in _CONNECTED.values():
        if (rendezvous := connected.rendezvous) is not None:
            is_first = False
            if said is not None and not is_another_s(error):
                is_first = rendezvous.peers.tell(said)
                if at_exit and not is_first:  # such as a collective of torch's, whose peer has gone
                    cause = rendezvous.peers.first_failure()
                    print(f"stagewise: the first failure: {cause}", file=sys.stderr, flush=True)
        connected.leave(said)
        if connected.peers.is_over:
            Finalize(None, _end_at_once, exitpriority=0)
    _CONNECTED.clear()
    return is_first


def _end_at_once() -> None:
    """End the process while others wait in collectives: gloo would wait for them as Python ends."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(1)
