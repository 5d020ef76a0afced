"""What every wire does, whatever carries its bytes: a new one joins by its row."""

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stagewise.batch.values import put_together, take_apart
from stagewise.engine.transport import choose_wires
from stagewise.engine.transport.choose_wires import Seat, wires_between
from stagewise.engine.transport.failure import Lost
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.wires import peers
from stagewise.engine.transport.wires.connect_sockets import connect_sockets
from stagewise.engine.transport.wires.group_wire import GroupWire, LinkGroups
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.sockets import Sockets
from stagewise.engine.transport.wires.wire import Wire, Wires
from stagewise.errors import CellError, PeerError
from stagewise.schedule import Message, forward_only, links, lower
from tests.engine.transport.late_device import late
from tests.engine.transport.wires import Lines, fake_wires, other_hosts
from tests.harness import Pools

CPU, LONG = torch.device("cpu"), timedelta(seconds=60)


# The rows: both ends in this process, or one in each of two.


def fake(*, stream: bool) -> list[Wires]:
    lines = Lines()
    return [fake_wires(rank, lines, stream=stream) for rank in (0, 1)]


def socket_pair() -> list[Wires]:
    ends = zip((0, 1), socket.socketpair(), strict=True)
    wires = [Sockets(Peers(rank), 2, {1 - rank: end}, LONG) for rank, end in ends]
    return [Wires(wire, wire, wire) for wire in wires]


def staged_here_on_one() -> list[Wires]:
    one, other = socket_pair()
    return [late(one), other]


def over_group() -> Wires:
    """Without sockets, as between hosts."""
    group, own = whole()
    wire = GroupWire(own, group)
    return Wires(wire, wire)


def over_links() -> Wires:
    """As on GPUs: a group of two ranks for each direction."""
    group, own = whole()
    wire = LinkGroups(own, group, CPU)
    wire.prepare([(0, 1), (1, 0)])
    return Wires(wire, wire, prepare=wire.prepare)


def nccl() -> Wires:
    group, own = whole()
    torch.cuda.set_device(dist.get_rank())
    data = LinkGroups(own, group, torch.device("cuda", torch.cuda.current_device()))
    data.prepare([(0, 1), (1, 0)])
    return Wires(data, GroupWire(own, group), prepare=data.prepare)


def by_sockets() -> Wires:
    wire, _ = connect_sockets(whole()[1], gathered, LONG)
    return Wires(wire, wire, wire)


def by_tcp() -> Wires:
    with other_hosts():
        return by_sockets()


def by_size() -> Wires:
    """As `connect` makes them."""
    group, own = whole()
    return wires_between([Seat.of(CPU, group)] * 2, CPU, group, group, own)


def on_gpus() -> Wires:
    """As `connect` makes them; the CPU stands for the GPUs of their links."""

    def links_on_cpu(own: Peers, group: dist.ProcessGroup, _: torch.device) -> LinkGroups:
        return LinkGroups(own, group, CPU)

    group, own = whole()
    seats = [Seat("host", "cuda", name, True) for name in "ab"]
    with mock.patch.object(choose_wires, "LinkGroups", links_on_cpu):
        wires = wires_between(seats, torch.device("cuda", 0), group, group, own)
    return wires


def connected(wires: Wires) -> Wires:
    assert wires.prepare is not None
    wires.prepare([(0, 1), (1, 0)])
    return wires


def of_hosts(wires: Wires) -> Wires:
    """The wire by which hosts tell each other what they agree on."""
    return Wires(wires.control, wires.control)


def staged_on(ranks: tuple[int, ...]) -> Wires:
    """The CPU of these ranks stands for a device; on others it is the CPU."""
    wires = by_size()
    return late(wires) if dist.get_rank() in ranks else wires


def whole() -> tuple[dist.ProcessGroup, Peers]:
    group = dist.group.WORLD
    assert group is not None
    return group, Peers(dist.get_rank(), dist.distributed_c10d._get_default_store())


def gathered(value: object) -> list[object]:
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


HERE: dict[str, Callable[[], list[Wires]]] = {
    "fake": lambda: fake(stream=False),
    "fake with a stream": lambda: fake(stream=True),
    "socket pair": socket_pair,
    "staged": lambda: list(map(late, socket_pair())),
    "staged on one": staged_here_on_one,
}
BETWEEN: dict[str, Callable[[], Wires]] = {
    "gloo": over_group,
    "a group a link": over_links,
    "Unix sockets": by_sockets,
    "TCP": by_tcp,
    "both by size": by_size,
    "on GPUs": lambda: connected(on_gpus()),
    "on GPUs, of the hosts": lambda: of_hosts(on_gpus()),
    "staged": lambda: staged_on((0, 1)),
    "staged on rank 1": lambda: staged_on((1,)),
    "NCCL": nccl,
}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")
ROWS = [pytest.param(row, marks=[TWO_GPUS] if row == "NCCL" else []) for row in BETWEEN]


# The contract. A check says what an end sends and has room for; then all of it must have come.


@dataclass(frozen=True)
class Check:
    sizes: tuple[tuple[int, ...], ...]  # elements of the tensors of every message
    posted_first: bool = False  # whether receives are started before anything is sent
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


CHECKS = {
    "in order": Check(tuple((size,) for size in (3, 1 << 20, 5, 1 << 18, 1, 300_000, 2))),
    "several tensors in a message": Check(((1, 70_000, 2), (400_000, 1), (), (1, 1, 1)) * 3),
    "sizes from nothing on": Check(((0,), (0, 0), (1, 0, 2), (0,), (4_000,))),
    "any dtype": Check(
        ((7,), (1 << 18,)) * 6,
        dtypes=(torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.uint8),
    ),
    "posted ahead": Check(((3,), (1 << 19,), (5, 6), (1 << 20, 2)), posted_first=True),
    "many both ways before anything is read": Check(((64,), (20_000,), (300_000,)) * 10),
}


QUICK = {"more tensors than the kernel takes at once": Check(((1,) * 1050, (0,) * 1050 + (3,)))}


def tensors_of(check: Check, rank: int, device: torch.device) -> list[list[Tensor]]:
    numbers = iter(range(1_000_000))
    messages = []
    for sizes in check.sizes:
        messages.append([])
        for size in sizes:
            n = next(numbers)
            dtype = check.dtypes[n % len(check.dtypes)]
            tensor = (torch.arange(size, device=device) + 7 * n + 3 * rank) % 97
            if n % 3 == 1:
                tensor = tensor.view(()) if size == 1 else tensor.view(1, -1)
            messages[-1].append(tensor.to(dtype))
    return messages


def exchanged(wire: Wire, other: int, check: Check, device: torch.device = CPU) -> Iterator[str]:
    """An end of it, pausing where the other end may have its turn; yields what is wrong."""
    sent = tensors_of(check, wire.rank, device)
    wanted = tensors_of(check, other, device)
    rooms = [[torch.empty_like(tensor) for tensor in message] for message in wanted]
    works = []
    if check.posted_first:
        works = [wire.start_receive(room, other) for room in rooms]
    yield ""
    while sent:  # the wire keeps what it still needs
        wire.start_send(sent.pop(0), other)
    yield ""
    for index, room in enumerate(rooms):
        (works[index] if works else wire.start_receive(room, other))()
        for got, tensor in zip(room, wanted[index], strict=True):
            if not torch.equal(got, tensor):
                yield f"message {index}: {tensor.numel()} elements are others"
    yield ""
    wire.finish()


def changing_forms(wires: Wires, num_bytes: int, device: torch.device = CPU) -> Iterator[str]:
    """Rank 0 sends mail whose form changes, rank 1 reads it; where it may not, that is said."""
    mail, rank = Mailbox(wires, device), wires.data.rank
    program = lower(forward_only([(0,), (1,)], 2))
    one, two = (step.sends[0] for step in program[0])
    x = torch.arange(num_bytes // 4, dtype=torch.float32, device=device)
    forms: list[object] = [x, x, (x[1:], None), {"a": x, "b": 0.5}, x.double(), None, x]
    for turn, form in enumerate(forms):
        mail.begin(1, links(program))
        yield ""
        if rank == 0:
            try:
                mail.send(one, take_apart(form))
            except CellError:
                if wires.stream is not None or turn < 2:
                    yield f"form {turn} was refused"
                mail.send_lost(one)
            mail.send(two, take_apart(x))
        yield ""
        if rank == 1:
            got = got_by(mail, one)
            if (turn < 2 or wires.stream is not None) and str(got) != str(form):
                yield f"form {turn} came as {got}"
            if not torch.equal(got_by(mail, two), x):  # type: ignore[arg-type]
                yield f"what follows form {turn} is another"
        mail.look_ahead()
        yield ""
        mail.finish()


def got_by(mail: Mailbox, message: Message) -> object:
    """What arrived, put together."""
    apart = mail.receive(message)
    return apart if isinstance(apart, Lost) else put_together(*apart)


def both(wires: list[Wires], make: Callable[[Wires], Iterator[str]]) -> list[str]:
    """What is wrong, with all ends in this process, in turn."""
    ends, wrong = [make(each) for each in wires], []
    while ends:
        for end in list(ends):
            said = next(end, None)
            if said is None:
                ends.remove(end)
            elif said:
                wrong.append(said)
    return wrong


@pytest.mark.parametrize("name", CHECKS | QUICK)
@pytest.mark.parametrize("row", HERE)
def test_in_one_process(row: str, name: str) -> None:
    wires = HERE[row]()

    def end(one: Wires) -> Iterator[str]:
        return exchanged(one.data, 1 - one.data.rank, (CHECKS | QUICK)[name])

    assert both(wires, end) == []


@pytest.mark.parametrize("num_bytes", [40, 1 << 22])
@pytest.mark.parametrize("row", ["fake", "fake with a stream", "socket pair"])
def test_forms_change_in_one_process(row: str, num_bytes: int) -> None:
    assert both(HERE[row](), lambda wires: changing_forms(wires, num_bytes)) == []


def all_checks(row: str) -> dict[str, list[str]]:
    """What is wrong with every check, in this of two processes, and what stays after `close`."""
    device = torch.device("cuda", dist.get_rank()) if row == "NCCL" else CPU
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir, before = folder, tempfile.tempdir
        try:
            wires = BETWEEN[row]()
            wrong = {
                name: [*filter(None, exchanged(wires.data, 1 - wires.data.rank, check, device))]
                for name, check in CHECKS.items()
            }
            for num_bytes in (40, 1 << 22):
                said = filter(None, changing_forms(wires, num_bytes, device))
                wrong[f"forms of {num_bytes} bytes"] = [*said]
            close(wires)
            held_before = held()
            again = BETWEEN[row]()
            list(exchanged(again.data, 1 - again.data.rank, CHECKS["in order"], device))
            close(again)
            wrong["what is left"] = sorted(held() - held_before) + os.listdir(folder)
        finally:
            tempfile.tempdir = before
    return wrong


def close(wires: Wires) -> None:
    for wire in {wires.data, wires.control}:
        wire.close()


def held() -> set[str]:
    """Threads, what files are open, and process groups."""
    threads = {f"thread {thread.name}" for thread in threading.enumerate()}
    files = {f"file {name}" for name in os.listdir("/proc/self/fd")}
    return threads | files | {str(group) for group in dist.distributed_c10d._world.pg_map}


@pytest.mark.parametrize("row", ROWS)
def test_between_processes(pools: Pools, row: str) -> None:
    for wrong in pools[2].run(all_checks, row):
        assert not {name: said for name, said in wrong.items() if said}


# A peer that ends, or raises, in the middle of a message.


@pytest.mark.parametrize("row", ["fake", "fake with a stream", "socket pair"])
def test_who_closes_in_one_process_is_named(row: str) -> None:
    mine, others = (wires.data for wires in HERE[row]())
    others.start_send([torch.ones(2)], 0)
    others.finish()
    others.close()
    work = mine.start_receive([torch.empty(2), torch.empty(300)], 1)
    with pytest.raises(PeerError, match="rank 0 lost rank 1"):
        work()


def lose_the_peer(row: str, cause: str) -> str:
    """Rank 1 sends one tensor of two, says the cause if there is one, and ends."""
    peers._PATIENCE_SECONDS = 0.1
    wires = BETWEEN[row]()
    device = torch.device("cuda", dist.get_rank()) if row == "NCCL" else CPU
    if dist.get_rank() == 1:
        if cause:
            whole()[1].tell(cause)
        wires.data.start_send([torch.ones(2, device=device)], 0)
        wires.data.finish()
        os._exit(1)
    rooms = [torch.empty(2, device=device), torch.empty(1 << 19, device=device)]
    with pytest.raises(PeerError) as raised:
        wires.data.start_receive(rooms, 1)()
    return str(raised.value)


@pytest.mark.parametrize("row", ROWS)
def test_who_ends_in_a_message_is_named(pools: Pools, row: str) -> None:
    cause = "ValueError: no more" if row == "gloo" else ""
    said = pools[2].outcomes(lose_the_peer, row, cause)[0]
    assert "rank 0 lost rank 1 while waiting for it" in said
    assert (
        f"rank 1: {cause}" if cause else "the process of rank 1 ended without saying why"
    ) in said
