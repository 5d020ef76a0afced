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
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

import torch

from stagewise.engine.transport.message_form import flat

_SMALL_BYTES = 1 << 20  # of a tensor; beyond that copying costs more than waking
_BUFFER_BYTES = 1 << 22  # asked for; the kernel may give less
_MESSAGES = 4  # that the buffer must hold at least, so that they travel while both compute
_NUMPY = (torch.float32, torch.float64, torch.int64, torch.bool)  # dtypes that NumPy has too
_NO_SIGNAL: int = getattr(socket, "MSG_NOSIGNAL", 0)  # SIGPIPE would end a process without a word
_RANK = struct.Struct("=i")


class Work(Protocol):
    """A message on its way; torch's works are such."""

    def wait(self) -> object:
        """Wait until it has arrived."""


class Neighbour:
    """The connection to another process of this host, for tensors of up to `limit` bytes."""

    def __init__(self, connection: socket.socket, timeout: timedelta, limit: int) -> None:
        self.limit, self._socket, self._seconds = limit, connection, timeout.total_seconds()
        self._late: _Late | None = None
        connection.settimeout(None)  # whatever socket.setdefaulttimeout says: the kernel's counts
        seconds, rest = divmod(timeout, timedelta(seconds=1))
        patience = struct.pack("@ll", seconds, rest.microseconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        _with_room(connection)

    def __del__(self) -> None:
        if self._late is None:
            self._socket.close()
        else:
            self._late.queue.put(None)

    def send(self, tensor: torch.Tensor, mark: bytes = b"") -> None:
        """Send `mark` and a dense tensor; raises OSError if the other process has gone."""
        sent, flags = 0, socket.MSG_DONTWAIT | _NO_SIGNAL
        if self._late is None or not self._late.queue.unfinished_tasks:
            try:
                if mark:
                    sent = self._socket.sendmsg((mark, _memory(tensor)), (), flags)
                else:
                    sent = self._socket.send(_memory(tensor), flags)
            except BlockingIOError:
                sent = 0
            if sent == len(mark) + tensor.nbytes:
                return
        if self._late is None:
            self._late = _Late(self._socket)
        if sent < len(mark):
            self._late.queue.put(memoryview(mark)[sent:])
        self._late.queue.put(_bytes(tensor)[max(0, sent - len(mark)) :])

    def receive(self, tensor: torch.Tensor, mark: bytearray | None = None) -> Work:
        """What reads the next bytes into `mark` and a dense tensor; wait for all in order."""
        return _Arriving(self._socket, tensor, self._seconds, mark)

    def finish(self) -> None:
        """Wait until everything sent has left; raises OSError if the other process has gone."""
        if self._late is not None:
            self._late.finish()


def meet(rank: int, gather: Callable[[Any], list[Any]], timeout: timedelta) -> dict[int, Neighbour]:
    """Connect to every other rank that runs on this host; all ranks call this.

    `gather` gives every rank's value, by rank. Who cannot connect is left out, for example since
    it runs elsewhere.
    """
    connections: dict[int, socket.socket] = {}
    gather(None)  # so that no folder stands while others are still on their way
    with ExitStack() as until_connected:
        listener = _listener(until_connected)
        limit = 0 if listener is None else min(_SMALL_BYTES, _with_room(listener) // _MESSAGES)
        everyone = gather((limit, listener and listener.getsockname()))
        for other, (_, address) in enumerate(everyone[:rank]):
            connection = _connected(address, rank)
            if connection is not None:
                connections[other] = connection
        callers = gather(sorted(connections))
        if listener is not None:
            for called in callers:
                if rank in called:
                    connection, _ = listener.accept()
                    connection.settimeout(None)
                    other = _RANK.unpack(connection.recv(_RANK.size, socket.MSG_WAITALL))[0]
                    connections[other] = connection
    return {
        other: Neighbour(connection, timeout, min(limit, everyone[other][0]))
        for other, connection in connections.items()
    }


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
    def __init__(
        self,
        connection: socket.socket,
        tensor: torch.Tensor,
        seconds: float,
        mark: bytearray | None,
    ) -> None:
        self._socket, self._tensor, self._seconds, self._mark = connection, tensor, seconds, mark

    def wait(self) -> None:
        tensor, since = self._tensor, time.monotonic()
        num_marks = 0 if self._mark is None else len(self._mark)
        try:
            if self._mark is None:
                read = self._socket.recv_into(_memory(tensor), 0, socket.MSG_WAITALL)
            else:
                rooms: list[Any] = [self._mark, _memory(tensor)]
                read = self._socket.recvmsg_into(rooms, 0, socket.MSG_WAITALL)[0]
            # A signal may come between; or what came in time is not all.
            while read < num_marks + tensor.nbytes:
                if time.monotonic() - since >= self._seconds:
                    raise BlockingIOError
                rest = _bytes(tensor)[max(0, read - num_marks) :]
                if self._mark is not None and read < num_marks:
                    rest = memoryview(self._mark)[read:]
                more = self._socket.recv_into(rest, 0, socket.MSG_WAITALL)
                if not more:
                    raise ConnectionError("the other process has closed its connection")
                read += more
        except BlockingIOError as error:
            raise TimeoutError(
                f"nothing came within the process group's timeout of {self._seconds:g} s"
            ) from error


def _send_all(
    connection: socket.socket, queue: "Queue[memoryview | None]", errors: list[OSError]
) -> None:
    while (data := queue.get()) is not None:
        try:
            if not errors:
                connection.sendall(data, _NO_SIGNAL)
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


def _listener(until: ExitStack) -> socket.socket | None:
    """A socket that listens in a folder of its own; None where there can be none."""
    try:
        folder = until.enter_context(tempfile.TemporaryDirectory(prefix="stagewise-"))
        listener = until.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.settimeout(None)
        listener.bind(str(Path(folder) / "socket"))
        listener.listen(socket.SOMAXCONN)
    except (AttributeError, OSError):  # another system; no folder, or too long a path
        return None
    return listener


def _with_room(connection: socket.socket) -> int:
    """The bytes of its buffer, as large as the kernel allows."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def _connected(address: str | None, rank: int) -> socket.socket | None:
    """A connection to who listens at `address`, which is told our rank; None if it cannot be."""
    if address is None:
        return None
    with ExitStack() as on_failure:
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            on_failure.callback(connection.close)
            connection.settimeout(None)
            connection.connect(address)
            connection.sendall(_RANK.pack(rank), _NO_SIGNAL)
        except (AttributeError, OSError):
            return None
        on_failure.pop_all()
    return connection
