"""Small messages through stream sockets: Unix ones on one host, TCP between hosts.

Gloo receives in its own thread, which then wakes the waiting one: two wake-ups, and several times
the processor time of a socket, for every message. A small message is written into
the kernel's buffer at once and read from there into its tensors; only the reader has to wake. What
does not fit into that buffer is left to a thread, so that sending never waits for the receiver.

Each direction of a socket carries bytes in order and nothing else: both ends know who sends what.
"""

import functools
import socket
import struct
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta

import torch

from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.wire import Arrival, Later, flat

_BUFFER_BYTES = 1 << 22  # asked for; the kernel may give less
_PIECES = 1000  # memory segments per system call; the kernel's limit is 1024
# Dtypes that NumPy also has.
_NUMPY = (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
_NO_SIGNAL: int = getattr(socket, "MSG_NOSIGNAL", 0)  # SIGPIPE would end a process without a word
_AT_ONCE: int = getattr(socket, "MSG_DONTWAIT", 0) | _NO_SIGNAL


class Sockets:
    """A wire to the ranks that `connect_sockets` could reach."""

    def __init__(
        self, peers: Peers, num_ranks: int, sockets: Mapping[int, socket.socket], timeout: timedelta
    ) -> None:
        self.rank, self.num_ranks, self._peers = peers.rank, num_ranks, peers
        self._links = {rank: _Link(one, timeout) for rank, one in sockets.items()}

    @property
    def reached(self) -> Collection[int]:
        return self._links.keys()

    def start_send(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        link, data, left = self._links[rank], list(map(_memory, tensors)), 0
        for part in data:
            left += part.nbytes
        if link.late is None or not link.late.is_busy():
            try:
                while left:
                    sent = link.socket.sendmsg(data[:_PIECES], (), _AT_ONCE)
                    left -= sent
                    data = _after(data, sent) if left else data
                return
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._peers.lost(error, rank) from error
        link.send_late(data)

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        return functools.partial(self._read, tensors, rank)

    def _read(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        link, rooms, left = self._links[rank], list(map(_memory, tensors)), 0
        for room in rooms:
            left += room.nbytes
        if len(rooms) > _PIECES:
            rooms = _after(rooms, 0)  # a call with only empty buffers would never return
        since = time.monotonic()
        try:
            while left:
                read = link.socket.recvmsg_into(rooms[:_PIECES], 0, socket.MSG_WAITALL)[0]
                if not read:
                    raise ConnectionError("the other process has closed its connection")
                left -= read
                if left:  # interrupted by a signal, or timed out with part of the data
                    rooms = _after(rooms, read)
                    if time.monotonic() - since >= link.seconds:
                        raise BlockingIOError
        except BlockingIOError as error:
            late = TimeoutError(
                f"nothing arrived within the process group's timeout of {link.seconds:g} s"
            )
            raise self._peers.lost(late, rank) from error
        except OSError as error:
            raise self._peers.lost(error, rank) from error

    def finish(self) -> None:
        for rank, link in self._links.items():
            if link.late is not None:
                with self._peers.named(rank):
                    link.late.finish()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    def interrupt(self) -> None:
        """Let both ends of every connection raise, also where a thread waits; any thread may."""
        for link in [*self._links.values()]:
            with suppress(OSError):
                link.socket.shutdown(socket.SHUT_RDWR)


class _Link:
    """The connection to one process, and data that did not fit into the kernel's buffer."""

    def __init__(self, connection: socket.socket, timeout: timedelta) -> None:
        self.socket, self.seconds = connection, timeout.total_seconds()
        self.late: Later | None = None
        connection.settimeout(None)  # overrides socket.setdefaulttimeout; the kernel's applies
        seconds, rest = divmod(timeout, timedelta(seconds=1))
        patience = struct.pack("@ll", seconds, rest.microseconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with_room(connection)

    def __del__(self) -> None:
        if self.late is None:
            self.socket.close()
        else:
            self.late.add(self.socket.close)

    def send_late(self, data: Sequence[memoryview]) -> None:
        self.late = self.late or Later()
        for part in data:
            self.late.add(functools.partial(self.socket.sendall, part, _NO_SIGNAL))

    def close(self) -> None:
        self.__del__()
        if self.late is not None:
            self.late.close()


def _after(data: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """Return `data` without its first `num_bytes`."""
    for index, part in enumerate(data):
        if num_bytes < part.nbytes:
            return [part.cast("B")[num_bytes:] if num_bytes else part, *data[index + 1 :]]
        num_bytes -= part.nbytes
    return []


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return a dense tensor's memory; a mark's, which comes with every message, is remembered."""
    if tensor.nbytes != 1:
        return _memory_of(tensor)
    known = _known.get(id(tensor))
    if known is None:
        if len(_known) == _MAX_KNOWN:
            del _known[next(iter(_known))]
        known = _known[id(tensor)] = tensor, _memory_of(tensor)
    return known[1]


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """Return its memory; usually without creating a tensor of its bytes."""
    usual = tensor.dtype in _NUMPY and tensor.is_contiguous()
    return tensor.numpy().data if usual else flat(tensor).numpy().data


_MAX_KNOWN = 8
# By id, which stays the tensor's own while it is kept here.
_known: dict[int, tuple[torch.Tensor, memoryview]] = {}


def with_room(connection: socket.socket) -> int:
    """Enlarge the send buffer as far as the kernel allows; return its bytes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
