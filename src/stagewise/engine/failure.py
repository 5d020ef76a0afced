"""The first failure, where every rank can read it.

When a rank fails its connections close, and its peers see just that. So a failing rank first
writes the cause into the store that the process group met through, and a rank that loses a
connection reads it from there.
"""

import time

from torch.distributed import Store  # type: ignore[attr-defined]

_KEY = "stagewise/failure"
_PATIENCE_SECONDS, _POLL_SECONDS = 2.0, 0.05


class FailureBoard:
    """Holds the first cause that any rank wrote."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank

    def write(self, cause: str) -> None:
        """Write `cause` unless another rank was first; a lost store is no further error."""
        try:
            self._store.compare_set(_KEY, "", f"rank {self._rank}: {cause}")
        except RuntimeError:
            return

    def read(self) -> str:
        """The first cause, waiting a moment for it; says so if there is none."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                if self._store.check([_KEY]):
                    return str(self._store.get(_KEY).decode())
            except RuntimeError:
                break  # the store's own process has gone
            time.sleep(_POLL_SECONDS)
        return "its process ended without a word (killed, or out of memory?)"
