"""Small messages between processes of one host: in order, whole, and without waiting to send."""

import runpy
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from stagewise.engine.transport.wires import connect_sockets, sockets
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.sockets import Sockets
from stagewise.engine.transport.wires.wire import Arrival
from stagewise.errors import PeerError
from tests.engine.transport.test_connect import made, transfer
from tests.engine.transport.wires import fresh_connections, other_hosts
from tests.harness import Pools

LONG, SMALL_BYTES = timedelta(seconds=60), 1 << 16


def pair(timeout: timedelta = LONG) -> tuple["End", "End"]:
    one, other = socket.socketpair()
    return End(0, one, timeout), End(1, other, timeout)


class End:
    """One of two."""

    def __init__(self, rank: int, connection: socket.socket, timeout: timedelta = LONG) -> None:
        self._wire = Sockets(Peers(rank), 2, {1 - rank: connection}, timeout)
        self._other = 1 - rank

    def send(self, *tensors: Tensor) -> None:
        self._wire.start_send(tensors, self._other)

    def receive(self, *tensors: Tensor) -> Arrival:
        return self._wire.start_receive(tensors, self._other)

    def finish(self) -> None:
        self._wire.finish()


def test_sending_waits_for_nobody_and_keeps_the_order() -> None:
    """64 MB are under way before the receiver reads; no kernel keeps as much in a socket."""
    sender, receiver = pair()
    sent = [torch.full((SMALL_BYTES // 8,), float(n), dtype=torch.float64) for n in range(1024)]
    for tensor in sent:
        sender.send(tensor)
    arriving = [torch.empty_like(tensor) for tensor in sent]
    for tensor in arriving:
        receiver.receive(tensor)()
    sender.finish()
    assert all(map(torch.equal, arriving, sent))
    sender.send(sent[5])  # what is late no more takes the short way again
    receiver.receive(arriving[0])()
    assert torch.equal(arriving[0], sent[5])


def test_both_directions_at_once() -> None:
    one, other = pair()
    for value in range(300):
        one.send(torch.full((1000,), value))
        other.send(torch.full((1000,), -value))
    for value in range(300):
        there, back = torch.empty(1000, dtype=torch.int64), torch.empty(1000, dtype=torch.int64)
        other.receive(there)()
        one.receive(back)()
        assert int(there[-1]) == value and int(back[0]) == -value


def test_a_message_in_pieces_becomes_whole() -> None:
    one, other = socket.socketpair()
    receiver, data = End(1, other), torch.arange(1000)

    def send_slowly() -> None:
        for start in range(0, 8000, 1000):
            one.sendall(data.numpy().tobytes()[start : start + 1000])

    thread, arrived = threading.Thread(target=send_slowly), torch.empty_like(data)
    with one:
        thread.start()
        receiver.receive(arrived)()
        thread.join()
    assert torch.equal(arrived, data)


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL])  # Python's, the shell's
def test_who_closes_is_missed(action: signal.Handlers) -> None:
    before = signal.signal(signal.SIGPIPE, action)
    try:
        check_who_closes_is_missed()
    finally:
        signal.signal(signal.SIGPIPE, before)


def check_who_closes_is_missed() -> None:
    sender, receiver = pair()
    sender.send(torch.ones(3))
    del sender  # what it sent arrives all the same
    receiver.receive(torch.empty(3))()
    with pytest.raises(PeerError, match="closed its connection"):
        receiver.receive(torch.empty(3))()
    with pytest.raises(PeerError, match="Broken pipe"):
        receiver.send(torch.ones(3))


def test_what_is_late_fails_too() -> None:
    sender, receiver = pair()
    for _ in range(1024):
        sender.send(torch.ones(SMALL_BYTES // 4))
    del receiver
    with pytest.raises(PeerError, match=r"Broken pipe|reset"):
        sender.finish()


def test_the_default_timeout_of_sockets_does_not_count() -> None:
    """Scripts that download their data often set one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        sender, receiver = pair()
    finally:
        socket.setdefaulttimeout(before)
    thread = threading.Timer(0.2, sender.send, [torch.ones(3)])
    thread.start()
    arrived = torch.empty(3)
    receiver.receive(arrived)()
    thread.join()
    assert torch.equal(arrived, torch.ones(3))


def test_waiting_ends_with_the_process_groups_timeout() -> None:
    _keeps_open, receiver = pair(timedelta(seconds=0.2))
    with pytest.raises(PeerError, match="the process group's timeout"):
        receiver.receive(torch.empty(3))()


def test_large_and_small_messages_of_a_link_keep_their_order(pools: Pools) -> None:
    sizes = [3, 1 << 20, 5, 1 << 18, (1 << 18) + 1, 1]  # floats; 1 MiB is the largest small one
    _, arrived = pools[2].run(sizes_of_transfer, sizes)
    assert arrived == [[(size, float(i)) for i, size in enumerate(sizes)]] * 3


def sizes_of_transfer(sizes: list[int]) -> list[list[tuple[int, float]]]:
    values: list[object] = [torch.full((size,), float(i)) for i, size in enumerate(sizes)]
    return [[(t.numel(), float(t[-1])) for t in got] for got in transfer(values, 3)]  # type: ignore


@pytest.mark.parametrize(
    "ways", [("_unix_listener",), ("_unix_listener", "_tcp_listener"), ("_is_able",)]
)
@pytest.mark.parametrize("without", [None, 0, 1])
def test_who_cannot_be_reached_gets_them_another_way(
    pools: Pools, without: int | None, ways: tuple[str, ...]
) -> None:
    """As on another host: rank `without` has no Unix socket to connect to, or no socket at all.

    If its system has none that serve, no rank uses any.
    """
    for rank, (reached, arrived) in enumerate(pools[3].run(neighbours, without, ways)):
        others = {0, 1, 2} - {rank}
        if without is not None and len(ways) == 2:
            others -= {r for r in others if min(r, rank) == without}
        if without is not None and ways == ("_is_able",):
            others = set()
        assert reached == others
        assert arrived == [[0, 1, 2]] * 3  # every rank's row


def neighbours(without: int | None, ways: tuple[str, ...]) -> tuple[set[int], list[list[int]]]:
    alone = torch.distributed.get_rank() == without
    with other_hosts(*ways) if alone else fresh_connections():
        ranks, mail = made()
    return set(mail._marked), [
        [row[0] for row in ranks.exchange([ranks.rank], "rank")] for _ in range(3)
    ]


def families(rank_elsewhere: int) -> dict[int, socket.AddressFamily]:
    """By rank, how this rank is connected to it; one is in a network of its own."""
    rank = torch.distributed.get_rank()

    def gather(value: object) -> list[object]:
        values: list[object] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
        return values

    with pytest.MonkeyPatch.context() as patch:
        if rank == rank_elsewhere:
            patch.setattr(connect_sockets, "network_here", lambda: 1)
        met, _ = connect_sockets.connect_sockets(Peers(rank), gather, LONG)
    return {other: socket.AddressFamily(met._links[other].socket.family) for other in met.reached}


@pytest.mark.parametrize("elsewhere", [0, 2])
def test_unix_sockets_stay_within_a_network(pools: Pools, elsewhere: int) -> None:
    """Containers that share a folder could connect by them, but are not one host."""
    unix, internet = socket.AF_UNIX, socket.AF_INET
    for rank, found in enumerate(pools[3].run(families, elsewhere)):
        for other, family in found.items():
            assert family == (internet if elsewhere in (rank, other) else unix)
        assert found.keys() == {0, 1, 2} - {rank}


def test_the_module_loads_where_a_call_cannot_be_told_not_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Windows, whose ranks use gloo alone."""
    for name in ("MSG_DONTWAIT", "MSG_NOSIGNAL", "AF_UNIX"):
        monkeypatch.delattr(socket, name)
    assert runpy.run_path(str(sockets.__file__))["_AT_ONCE"] == 0


def test_a_late_rest_does_not_double_the_patience() -> None:
    """What came in time is a part only; the kernel's timeout begins anew with each read."""
    one, other = socket.socketpair()
    receiver = End(1, other, timedelta(milliseconds=600))
    one.sendall(bytes(8))
    start = time.monotonic()
    with one, pytest.raises(PeerError, match=r"timeout of 0\.6 s"):
        receiver.receive(torch.empty(1000))()
    assert time.monotonic() - start < 1.1


def test_a_mark_comes_with_its_message() -> None:
    sender, receiver = pair()
    sent = [torch.full((SMALL_BYTES // 8,), float(n), dtype=torch.float64) for n in range(256)]
    for n, tensor in enumerate(sent):  # more than a socket holds: some are sent in pieces
        sender.send(torch.tensor([n]), tensor)
    sender.send(torch.tensor([-1]), torch.empty(0))
    for n, tensor in enumerate(sent):
        mark, room = torch.tensor([0]), torch.empty_like(tensor)
        receiver.receive(mark, room)()
        assert int(mark) == n and torch.equal(room, tensor)
    receiver.receive(mark, torch.empty(0))()
    assert int(mark) == -1
