"""Choose the devices and wires for a plan."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from stagewise.engine.transport.connect_sockets import connect_sockets
from stagewise.engine.transport.group_wire import GroupWire
from stagewise.engine.transport.local import LocalMailbox, LocalWire
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.peers import Peers
from stagewise.engine.transport.processes import are_ready, num_processes, own_device
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.transport import Transport
from stagewise.engine.transport.wire import BySize, Wire, Wires
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
    """Return the plan's devices and this rank's transport; PlanError if they do not fit.

    In one process, stage s is on device `homes[s]`.
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
        own = [torch.device(d) for d in devices or [_home(chain)] * num_devices]
        return own, in_one_process([own[device] for device in homes])
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
    wire = LocalWire()
    ranks = Ranks(Wires(wire, wire), Peers(0), devices[-1])
    return Transport(LocalMailbox(devices), ranks)


def between_processes(device: torch.device, group: dist.ProcessGroup | None = None) -> Transport:
    """Return this rank's transport, its stage on `device`; collective over `group`."""
    group, peers = _whole(group)
    wires = wires_for(device, group, peers)
    return Transport(Mailbox(wires, device), Ranks(wires, peers, device, group))


def trial_wire() -> Wire:
    """Return a wire like a pipeline's data wire, but without creating process groups."""
    group, peers = _whole(None)
    if own_device().type == "cpu":
        return wires_for(own_device(), group, peers).data
    return GroupWire(peers, group, group)


def _whole(group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup, Peers]:
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    return group, Peers(dist.get_rank(group), dist.distributed_c10d._get_default_store())


def wires_for(device: torch.device, group: dist.ProcessGroup, peers: Peers) -> Wires:
    """On CPUs small tensors go through sockets; GPUs use two groups for data, gloo for control."""
    if device.type != "cpu":
        data = GroupWire.connect(peers, group, ways=2)
        return Wires(data, GroupWire.connect(peers, group, ways=1, backend="gloo"))

    def gather(value: object) -> list[object]:
        values = [value] * dist.get_world_size(group)
        with peers.named():
            dist.all_gather_object(values, value, group=group)
        return values

    timeout = group._get_backend(device).options._timeout
    sockets, limits = connect_sockets(peers, gather, timeout)
    wire = BySize(sockets, GroupWire(peers, group, group), limits)
    return Wires(wire, wire, sockets)


def _home(chain: Chain) -> torch.device:
    for cell in chain:
        for tensor in (*cell.module.parameters(), *cell.module.buffers()):
            return torch.device("cpu") if tensor.is_meta else tensor.device
    return torch.device("cpu")
