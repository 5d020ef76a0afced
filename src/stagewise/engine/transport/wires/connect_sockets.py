"""Connect ranks by sockets: Unix sockets on one host, TCP between hosts.

Each rank listens and tells the others its address; of two ranks the higher one connects. It sends
its rank and the secret that the listener shared through the process group, and a connection counts
once both ends have it. So a stranger's bytes are never read as a message (headers are unpickled).

Containers may share a folder, but not the network: Unix sockets stay within one network namespace.
A host's address is the local end of its route to the process group's store. On the store's own
host that is loopback; there, it is the local end of its route to another host.
"""

import functools
import ipaddress
import secrets
import socket
import struct
import tempfile
from collections.abc import Callable, Collection
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.sockets import Sockets, with_room

_SMALL_BYTES = 1 << 20  # of a tensor; beyond that, copying costs more than waking
_MESSAGES = 4  # that a buffer must hold, so that they travel while both ends compute
_PATIENCE_SECONDS = 5.0  # with a host that does not answer, or a caller that sends nothing
_HELLO = struct.Struct("=i16s")  # rank and secret

Gather = Callable[[Any], list[Any]]  # every rank's value, by rank
_Listener = Callable[[ExitStack], socket.socket | None]


def connect_sockets(
    peers: Peers, gather: Gather, timeout: timedelta
) -> tuple[Sockets, dict[int, int]]:
    """Connect to every other rank that can be reached; collective.

    Also returns, by rank, the largest tensor in bytes that should go this way.
    """
    # Waits for all, so that sockets' folders exist only briefly.
    able = gather(_is_able())
    num_ranks = len(able)
    if not all(able):
        return Sockets(peers, num_ranks, {}, timeout), {}
    met, limits = _met(peers.rank, gather, _unix_listener, set(range(num_ranks)))
    if not all(gather(len(met) == num_ranks - 1)):
        listens = functools.partial(_tcp_listener, _own_address(peers.store_host(), gather))
        further = _met(peers.rank, gather, listens, set(range(num_ranks)) - {*met})
        met, limits = met | further[0], limits | further[1]
    return Sockets(peers, num_ranks, met, timeout), limits


def _is_able() -> bool:
    """Return whether sockets take several tensors at once here; those of Windows do not."""
    return hasattr(socket.socket, "sendmsg")


def network_here() -> int | None:
    """Return what tells this process's network from those of other containers; None if unknown."""
    try:
        return Path("/proc/self/ns/net").stat().st_ino
    except OSError:  # not Linux
        return None


def _met(
    rank: int, gather: Gather, listens: _Listener, wanted: Collection[int]
) -> tuple[dict[int, socket.socket], dict[int, int]]:
    """Connect to the ranks in `wanted` that this way reaches; return connections and limits."""
    secret, met = secrets.token_bytes(16), dict[int, socket.socket]()
    with ExitStack() as until_connected:
        listener = listens(until_connected)
        where = listener and (int(listener.family), listener.getsockname())
        network = network_here()
        told = gather((where, secret, network))[:rank]
        for other, (place, known, there) in enumerate(told):
            if other not in wanted or (listens is _unix_listener and there != network):
                continue
            if (called := _called(place, known, rank)) is not None:
                met[other] = called
        callers = {other for other, called in enumerate(gather({*met})) if rank in called}
        if listener is not None:
            met |= _accepted(listener, secret, callers)
    rooms = {other: min(_SMALL_BYTES, with_room(met[other]) // _MESSAGES) for other in met}
    theirs = [told.get(rank) for told in gather(rooms)]
    limits = {other: min(room, theirs[other]) for other, room in rooms.items() if theirs[other]}
    for other in met.keys() - limits:
        met.pop(other).close()
    return met, limits


def _called(where: tuple[int, Any] | None, secret: bytes, rank: int) -> socket.socket | None:
    """Connect to the listener at `where` and send our rank; None if that fails."""
    if where is None:
        return None
    with ExitStack() as on_failure:
        try:
            connection = socket.socket(where[0], socket.SOCK_STREAM)
            on_failure.callback(connection.close)
            connection.settimeout(_PATIENCE_SECONDS)
            connection.connect(where[1])
            connection.sendall(_HELLO.pack(rank, secret))
        except OSError:
            return None
        on_failure.pop_all()
    return connection


def _accepted(
    listener: socket.socket, secret: bytes, callers: Collection[int]
) -> dict[int, socket.socket]:
    """Accept the connections of the ranks `callers`; close any other."""
    listener.settimeout(_PATIENCE_SECONDS)
    accepted = dict[int, socket.socket]()
    try:
        while len(accepted) < len(callers):
            connection, _ = listener.accept()
            rank = _greeted(connection, secret)
            if rank is not None and rank in callers:
                accepted[rank] = connection
            else:
                connection.close()
    except OSError:  # a caller that did not get through
        pass
    return accepted


def _greeted(connection: socket.socket, secret: bytes) -> int | None:
    """Return the caller's rank; None if it does not know the secret."""
    connection.settimeout(_PATIENCE_SECONDS)
    try:
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        rank, said = _HELLO.unpack(hello)
    except (OSError, struct.error):
        return None
    return int(rank) if secrets.compare_digest(said, secret) else None


def _unix_listener(until: ExitStack) -> socket.socket | None:
    """Return a socket that listens in its own folder; None if that is not possible."""
    try:
        folder = until.enter_context(tempfile.TemporaryDirectory(prefix="stagewise-"))
        listener = until.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(Path(folder) / "socket"))
        listener.listen(socket.SOMAXCONN)
    except (AttributeError, OSError):  # no Unix sockets; no folder, or its path is too long
        return None
    return listener


def _tcp_listener(address: str | None, until: ExitStack) -> socket.socket | None:
    """Return a socket that listens on a free port of this host's `address`; None if it cannot."""
    if address is None:
        return None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return until.enter_context(socket.create_server((address, 0), family=family))
    except OSError:
        return None


def _own_address(store_host: str, gather: Gather) -> str | None:
    """Return the address by which other ranks reach this host; collective."""
    start = _start_of_way(store_host)
    seen = [told for told in gather(start) if told is not None and not _is_loopback(told)]
    return _start_of_way(seen[0]) if seen and (start is None or _is_loopback(start)) else start


def _start_of_way(host: str) -> str | None:
    """Return the local address of this host's route to `host`; sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
