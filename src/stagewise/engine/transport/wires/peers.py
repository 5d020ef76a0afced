"""What this rank raises when another does not answer: which rank, and why.

When a rank is lost, its peers only see its connections close. So, if it can, it first writes the
cause into the process group's store, where a rank that loses a connection reads it.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.engine.watch.now import ANY, NOW
from stagewise.engine.watch.shared_store import in_time, served_by
from stagewise.engine.watch.watchdog import ALONE, FAILURE, WAITS
from stagewise.errors import PeerError

_PATIENCE_SECONDS, _POLL_SECONDS, _STORE_SECONDS = 2.0, 0.05, 3.0
SILENT = "without saying why"  # in the message if a rank has left no words
_LATE = ("timed out", "timeout")  # in the messages of gloo and NCCL


class Peers:
    """The other ranks, which may be lost; `store` holds the first cause.

    `numbers` are what ranks are called there, if the group is a part of a mesh. Nothing more can be
    sent once it `is_over`.
    """

    def __init__(
        self, rank: int, store: Store | None = None, numbers: Sequence[int] | None = None
    ) -> None:
        self.rank, self.store, self._numbers = rank, store, numbers
        self.patience, self.is_over = _PATIENCE_SECONDS, False
        self._kills = None if store is None else MemoryKills()  # there is nobody without one

    def store_host(self) -> str:
        """Return the host that serves the store; this host's name if none does."""
        served = None if self.store is None else served_by(self.store)
        return served.host if isinstance(served, TCPStore) else socket.gethostname()

    def tell(self, cause: str) -> bool:
        """Write why this rank stops; return False if another did first. Ignores a lost store."""
        here = self.number(self.rank)
        said = cause if NOW.place and NOW.place in cause else f"rank {here}: {cause}"
        kept = self._asked(lambda store: store.compare_set(FAILURE, "", said))
        return kept is None or kept.decode() == said

    def first_failure(self) -> str | None:
        """Return what the rank that stopped first has told."""
        return self._read(FAILURE)

    def note(self, cause: str) -> None:
        """Write why this rank fails in a call that may yet be undone; "": it has been."""
        if (store := self.store) is not None:
            with suppress(RuntimeError, OSError):
                in_time(lambda: store.set(ALONE, cause), _STORE_SECONDS)

    def all_fail(self, what: str, num_ranks: int, *, clean: bool) -> bool:
        """Note that this rank fails in `what`, a name used once; return whether all soon do, and
        all `clean`.
        """
        own, deadline = "clean" if clean else "not", time.monotonic() + _PATIENCE_SECONDS

        def asked(store: Store) -> bytes:
            store.set(f"{what} {self.rank}", own)
            keys = [f"{what} {rank}" for rank in range(num_ranks)]
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            return b"".join(store.get(key) for key in keys) if store.check(keys) else b"not"

        return self._asked(asked) == b"clean" * num_ranks

    def number(self, rank: int) -> int:
        """Return what a rank is called in messages."""
        return rank if self._numbers is None else self._numbers[rank]

    @contextmanager
    def named(self, other: int | None = None) -> Iterator[None]:
        """Turn errors of talking to rank `other` (None: to all) inside into PeerError."""
        noted = NOW.awaits is None and threading.get_ident() == NOW.thread
        if noted:
            NOW.awaits = ANY if other is None else self.number(other)
        try:
            yield
        except PeerError:
            raise
        except (RuntimeError, OSError) as error:
            raise self.lost(error, other) from error
        finally:
            if noted:
                NOW.awaits = None

    def lost(self, error: RuntimeError | OSError, other: int | None = None) -> PeerError:
        """Return what to raise when `error` shows that rank `other` is lost or silent."""
        name = "another rank" if other is None else f"rank {self.number(other)}"
        late = isinstance(error, TimeoutError) or any(w in str(error).lower() for w in _LATE)
        unknown = (
            self._read(WAITS)
            or f"none was reported: {name} is alive but hangs, runs other code than this rank, or "
            "is slower than the timeout of init_process_group"
            if late
            else f"the process of {name} ended {SILENT} ({self._killed()})"
        )
        message = (
            f"rank {self.number(self.rank)} lost {name} while waiting for it"
            + (f" in {NOW.when(NOW.call)}" if NOW.call else "")
            + (f" ({error})" if isinstance(error, OSError) or late else "")
            + f". First failure: {self._cause() or unknown}"
        )
        self.tell(message)
        raised = PeerError(message)
        raised.is_first = late
        return raised

    def _killed(self) -> str:
        number = self._kills.number if self._kills else None
        by_kernel = f"since the start the kernel has killed {number} here because memory ran out"
        return by_kernel if number else "killed, or out of memory?"

    def _read(self, key: str) -> str | None:
        """Return what the store holds, None if it does not or is gone."""
        found = self._asked(lambda store: store.get(key) if store.check([key]) else b"")
        return found.decode() if found else None

    def _asked(self, ask: Callable[[Store], bytes]) -> bytes | None:
        """Return the store's answer, None if it is gone; then it is not asked again."""
        store = self.store
        if store is not None:
            try:
                return in_time(lambda: ask(store), _STORE_SECONDS)
            except (RuntimeError, OSError):
                self.store = None  # its process is gone or stopped, or the link is cut
        return None

    def _cause(self) -> str | None:
        """Return the first cause, or None; waits for it briefly, but only the first time."""
        deadline = time.monotonic() + self.patience
        while (cause := self._read(FAILURE)) is None and time.monotonic() < deadline:
            if self.store is None:
                break
            time.sleep(_POLL_SECONDS)
        self.patience = 0
        return cause
