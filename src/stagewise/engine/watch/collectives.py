"""A rank that waits in a collective of torch.distributed for one that has failed.

Problem: on a mesh, cells have collectives of their own (tensor parallelism, split attention,
experts). A rank that fails in one stays in step, so that the call can be undone on all; but those
beside it wait inside the collective, which gloo cannot be made to leave (its `abort` does nothing):
only a closed connection ends it.
Idea: the failing rank notes its failure in the store. A rank that sees the note and waits in a
collective, at two looks in a row, makes it the failure of the whole run. Then every rank leaves its
waits for messages and raises; connections close as programs end, and so do collectives.
"""

import sys
from pathlib import Path

import torch.distributed as dist

from stagewise.engine.watch.now import Now

_FRAMES = 8  # innermost ones, among which a collective's are
_COLLECTIVES = str(Path(dist.__file__).parent), str(Path(__file__).parents[2] / "parallel")
_ENDED = (  # in messages of gloo
    "Application timeout",
    "Broken pipe",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
)


def is_in_collective(now: Now) -> bool:
    """Return whether the thread that makes calls runs code of torch.distributed, or of ours that
    waits for its collectives.
    """
    frame = sys._current_frames().get(now.thread) if now.awaits is None else None
    for _ in range(_FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_filename.startswith(_COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def run_on_devices() -> bool:
    """Return whether collectives are kernels, as NCCL's."""
    return dist.is_initialized() and dist.get_backend() != "gloo"


def was_ended(error: BaseException | None) -> bool:
    """Return whether `error` is a collective's, by which another rank is lost or silent."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    text, torchs = str(error), type(error) is RuntimeError
    return torchs and "gloo" in text and any(words in text for words in _ENDED)
