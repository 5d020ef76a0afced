"""The store of a process group, for whoever must not wait for it.

Problem: when the process that serves a TCPStore has ended, as in the usual end of a program, torch
prints a page of C++ for every client that still asks; when it is stopped, or the link is cut, a
client waits for good, whatever its timeout. Idea: an idle connection to the same port shows the end
first, and a thread asks, which can be left behind.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_CONNECT_SECONDS = 10.0
T = TypeVar("T")


class StoreGone(ConnectionError):
    """The process that serves the store has ended."""


def in_time(ask: Callable[[], T], seconds: float) -> T:
    """Return what `ask` returns; raise StoreGone if that takes longer than `seconds`."""
    answers: SimpleQueue[tuple[T | None, Exception | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    Thread(target=run, name="stagewise store", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except Empty:
        raise StoreGone(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


class SharedStore:
    """A store of its own for one thread; no call takes longer than `timeout`."""

    def __init__(self, store: Store, timeout: timedelta) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timeout)
        self._seconds = timeout.total_seconds()
        self._idle: socket.socket | None = None
        if isinstance(served := served_by(store), TCPStore):
            with suppress(OSError):
                address = served.host, served.port
                self._idle = socket.create_connection(address, _CONNECT_SECONDS)

    def get(self, key: str) -> str | None:
        """Return a key's value, None without one; raise StoreGone, or RuntimeError if late."""
        return self.get_each(key)[0]

    def get_each(self, *keys: str) -> list[str | None]:
        """Return each key's value, None without one; raise as `get` does."""
        self._check_alive()
        store = self._store
        found = in_time(
            lambda: [store.get(key) if store.check([key]) else None for key in keys], self._seconds
        )
        return [None if value is None else value.decode() for value in found]

    def set(self, key: str, value: str) -> None:
        """Set a key's value; raise as `get` does."""
        self._check_alive()
        in_time(lambda: self._store.set(key, value), self._seconds)

    def set_first(self, key: str, value: str) -> None:
        """Set a key's value unless it has one; raise as `get` does."""
        self._check_alive()
        in_time(lambda: self._store.compare_set(key, "", value), self._seconds)

    def close(self) -> None:
        """Close the idle connection."""
        if self._idle is not None:
            self._idle.close()

    def _check_alive(self) -> None:
        if self._idle is None:
            return
        with suppress(BlockingIOError):
            self._idle.setblocking(False)
            try:
                ended = not self._idle.recv(1)
            except ConnectionError:
                ended = True
            if ended:
                raise StoreGone("its process has ended")


def served_by(store: Store) -> Store:
    """Return the store below all prefixes."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store
