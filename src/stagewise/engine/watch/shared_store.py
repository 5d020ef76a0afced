"""The store of a process group, for a thread that asks it again and again.

Problem: when the process that serves a TCPStore has ended, as in the usual end of a program, torch
prints a page of C++ for every client that still asks. Idea: an idle connection to the same port
shows that end first.
"""

import socket
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_CONNECT_SECONDS = 10.0


class StoreGone(ConnectionError):
    """The process that serves the store has ended."""


class SharedStore:
    """A store of its own for one thread; no call takes longer than `timeout`."""

    def __init__(self, store: Store, timeout: timedelta) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timeout)
        self._idle: socket.socket | None = None
        if isinstance(served := served_by(store), TCPStore):
            with suppress(OSError):
                address = served.host, served.port
                self._idle = socket.create_connection(address, _CONNECT_SECONDS)

    def get(self, key: str) -> str | None:
        """Return a key's value, None without one; raise StoreGone, or RuntimeError if late."""
        self._check_alive()
        return self._store.get(key).decode() if self._store.check([key]) else None

    def set(self, key: str, value: str) -> None:
        """Set a key's value; raise as `get` does."""
        self._check_alive()
        self._store.set(key, value)

    def set_first(self, key: str, value: str) -> None:
        """Set a key's value unless it has one; raise as `get` does."""
        self._check_alive()
        self._store.compare_set(key, "", value)

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
