"""Small messages between processes of one host, through Unix sockets.

Gloo receives in a thread of its own, which then wakes the one that waits: two wake-ups, and
several times the processor time of a socket, for every message. A small message is written into
the kernel's buffer at once and read from there into its tensor; only the reader has to wake. What
finds no room in that buffer is left to a thread, so that sending never waits for the receiver.

Each direction of a socket carries bytes in order and nothing else: who sends what, both ends know.
"""

import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Queue
from typing import Protocol

import torch

from stagewise.engine.layout import flat

SMALL_BYTES = 1 << 16  # of a tensor; beyond that copying costs more than waking
_BUFFER_BYTES = 1 << 22  # asked for; the kernel may give less
_NUMPY = (torch.float32, torch.float64, torch.int64, torch.bool)  # dtypes that NumPy has too
_RANK = struct.Struct("=i")


class Work(Protocol):
    """A message on its way; torch's works are such."""

    def wait(self) -> object:
        """Wait until it has arrived, or left."""

    def is_completed(self) -> bool:
        """Whether that is known to be so."""


class Neighbour:
    """The connection to another process of this host."""

    def __init__(self, connection: socket.socket, timeout: timedelta) -> None:
        seconds, rest = divmod(timeout, timedelta(seconds=1))
        limit = struct.pack("@ll", seconds, rest.microseconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._socket = connection
        self._late: _Late | None = None

    def __del__(self) -> None:
        if self._late is None:
            self._socket.close()
        else:
            self._late.queue.put(None)

    def send(self, tensor: torch.Tensor) -> None:
        """Send a dense tensor; raises OSError if the other process has gone."""
        sent = 0  # bytes
        if self._late is None or not self._late.queue.unfinished_tasks:
            try:
                sent = self._socket.send(_memory(tensor), socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            if sent == tensor.nbytes:
                return
        if self._late is None:
            self._late = _Late(self._socket)
        self._late.queue.put(_bytes(tensor)[sent:])

    def receive(self, tensor: torch.Tensor) -> Work:
        """What reads the next bytes into a dense tensor; wait for all of these in order."""
        return _Arriving(self._socket, tensor)

    def finish(self) -> None:
        """Wait until everything sent has left; raises OSError if the other process has gone."""
        if self._late is not None:
            self._late.finish()


def meet(
    rank: int, gather: Callable[[object], list[object]], timeout: timedelta
) -> dict[int, Neighbour]:
    """Connect to every other rank that runs on this host; all ranks call this.

    `gather` gives every rank's value, by rank. Who cannot connect is left out, for example since
    it runs elsewhere.
    """
    connections: dict[int, socket.socket] = {}
    with tempfile.TemporaryDirectory(prefix="stagewise-") as folder:
        listener, address = _listener(Path(folder) / "socket")
        addresses = gather(address)
        for other in range(rank):
            connection = _connected(addresses[other], rank)
            if connection is not None:
                connections[other] = connection
        callers = gather(sorted(connections))
        if listener is not None:
            for called in callers:
                if isinstance(called, list) and rank in called:
                    connection, _ = listener.accept()
                    other = _RANK.unpack(connection.recv(_RANK.size, socket.MSG_WAITALL))[0]
                    connections[other] = connection
            listener.close()
    return {other: Neighbour(connection, timeout) for other, connection in connections.items()}


class _Late:
    """What the kernel had no room for, sent in order by a thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.queue: Queue[memoryview | None] = Queue()
        self._errors: list[OSError] = []
        # A daemon: a rank that fails must be able to end while its messages are stuck.
        arguments = (connection, self.queue, self._errors)
        threading.Thread(target=_send_all, args=arguments, daemon=True).start()

    def finish(self) -> None:
        self.queue.join()
        if self._errors:
            raise self._errors[0]


class _Arriving:
    def __init__(self, connection: socket.socket, tensor: torch.Tensor) -> None:
        self._socket, self._tensor = connection, tensor

    def wait(self) -> None:
        tensor = self._tensor
        read = self._socket.recv_into(_memory(tensor), 0, socket.MSG_WAITALL)
        while read < tensor.nbytes:  # a signal came between
            more = self._socket.recv_into(_bytes(tensor)[read:], 0, socket.MSG_WAITALL)
            if not more:
                raise ConnectionError("the other process has closed its connection")
            read += more

    def is_completed(self) -> bool:
        return False


def _send_all(
    connection: socket.socket, queue: "Queue[memoryview | None]", errors: list[OSError]
) -> None:
    while (data := queue.get()) is not None:
        try:
            if not errors:
                connection.sendall(data)
        except OSError as error:
            errors.append(error)
        queue.task_done()
    connection.close()


def _memory(tensor: torch.Tensor) -> memoryview:
    """That of a dense tensor; in the usual case without making a tensor of its bytes."""
    usual = tensor.dtype in _NUMPY and tensor.is_contiguous()
    return tensor.numpy().data if usual else _bytes(tensor)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return flat(tensor).numpy().data


def _listener(path: Path) -> tuple[socket.socket | None, str | None]:
    """A socket that listens at `path`; nothing where there are no such sockets."""
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(socket.SOMAXCONN)
    except (AttributeError, OSError):  # another system; a path that is too long
        return None, None
    return listener, str(path)


def _connected(address: object, rank: int) -> socket.socket | None:
    """A connection to who listens at `address`, which is told our rank; None if it cannot be."""
    if not isinstance(address, str):
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address)
        connection.sendall(_RANK.pack(rank))
    except OSError:
        connection.close()
        return None
    return connection
