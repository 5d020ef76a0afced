"""What this rank raises when another one does not answer: who, since when, and why."""

from stagewise.engine.transport.failure import FailureBoard
from stagewise.errors import PeerError

_LATE = ("timed out", "timeout")  # in what gloo and NCCL raise


class Peer:
    """Talk to rank `other` inside (to all, if None); raises PeerError if it is lost or silent."""

    def __init__(self, failures: FailureBoard, rank: int, other: int | None = None) -> None:
        self._failures, self._rank = failures, rank
        self._name = "another rank" if other is None else f"rank {other}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, RuntimeError | OSError) or isinstance(error, PeerError):
            return
        late = isinstance(error, TimeoutError) or any(w in str(error).lower() for w in _LATE)
        cause = self._failures.read(
            f"none was told: {self._name} is alive but hangs, is in other code than this rank, or "
            "is slower than the timeout of init_process_group"
            if late
            else f"the process of {self._name} ended without a word (killed, or out of memory?)"
        )
        raise PeerError(
            f"rank {self._rank} lost {self._name} while waiting for it"
            + (f" ({error})" if isinstance(error, OSError) or late else "")
            + f". First failure: {cause}"
        ) from error
