"""Who may connect, and at which address: only ranks of the group, at one that others reach."""

import socket
from contextlib import ExitStack

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from stagewise.engine.transport.wires import connect_sockets
from stagewise.engine.transport.wires.connect_sockets import (
    _HELLO,
    _accepted,
    _called,
    _own_address,
    _tcp_listener,
)
from stagewise.engine.transport.wires.peers import Peers

SECRET, OTHER = b"s" * 16, b"t" * 16


def test_strangers_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_sockets, "_PATIENCE_SECONDS", 0.2)
    with ExitStack() as until:
        listener = _tcp_listener("127.0.0.1", until)
        assert listener is not None
        place = int(listener.family), listener.getsockname()
        calls = [_called(place, OTHER, 1), _called(place, SECRET, 2)]  # no secret; not awaited
        silent, short = (socket.create_connection(place[1]) for _ in range(2))
        short.sendall(_HELLO.pack(1, SECRET)[:-1])
        calls += [_called(place, SECRET, 1), silent, short]
        accepted = _accepted(listener, SECRET, {1, 3})  # rank 3 does not come through
        for call in calls:
            assert call is not None
            until.enter_context(call)
        assert accepted.keys() == {1}
        with accepted[1] as connection:
            connection.sendall(b"welcome")
        heard = [call.recv(8) for call in calls if call is not None]
        assert heard == [b"", b"", b"welcome", b"", b""]


def test_nobody_listens() -> None:
    with ExitStack() as until:
        listener = _tcp_listener("127.0.0.1", until)
        assert listener is not None
        place = int(listener.family), listener.getsockname()
    assert _called(place, SECRET, 1) is None and _called(None, SECRET, 1) is None
    with ExitStack() as until:
        assert _tcp_listener(None, until) is None
        assert _tcp_listener("192.0.2.1", until) is None  # of no host, says RFC 5737


@pytest.mark.parametrize(
    ("starts", "seen", "wanted"),
    [
        ({"store": "10.0.0.2"}, ["127.0.0.1", "10.0.0.2"], "10.0.0.2"),  # another host than its
        ({"store": "127.0.0.1", "10.0.0.2": "10.0.0.1"}, [None, "10.0.0.2"], "10.0.0.1"),  # its own
        ({"store": "127.0.0.1"}, ["127.0.0.1", "127.0.1.1"], "127.0.0.1"),  # there is no other
        ({"store": "::1", "fe80::2%2": "fe80::1"}, ["fe80::2%2", "::1"], "fe80::1"),
        ({}, [None, None], None),
    ],
)
def test_a_host_is_reached_by_where_its_way_starts(
    monkeypatch: pytest.MonkeyPatch,
    starts: dict[str, str],
    seen: list[str | None],
    wanted: str | None,
) -> None:
    monkeypatch.setattr(connect_sockets, "_start_of_way", starts.get)
    assert _own_address("store", lambda _: seen) == wanted


def test_where_a_store_is_served() -> None:
    served = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert Peers(0, PrefixStore("one", PrefixStore("two", served))).store_host() == "localhost"
    for store in (None, PrefixStore("one", HashStore())):
        assert Peers(0, store).store_host() == socket.gethostname()
    assert connect_sockets._start_of_way("localhost") in ("127.0.0.1", "::1")
