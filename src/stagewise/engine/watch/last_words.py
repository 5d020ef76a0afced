"""What a rank says when an error ends its program.

Problem: the others should hear why at once, not that a connection was closed; and torchrun's
summary, the last that a user sees, says "exitcode: 1" and may blame a rank that only lost another.
Idea: one sentence, told to the ranks that wait, and written into the file from which torchrun takes
its summary. Python has printed the traceback, so it is not repeated there. torchrun takes the
earliest failure for the cause; a rank that reports another's dates its own later.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from stagewise.engine.watch.now import NOW
from stagewise.errors import PeerError

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # environment variable of torch's elastic launcher
_LATER_SECONDS = 5  # than a killed rank, which the launcher dates when it sees it


def last_words(error: BaseException) -> str:
    """Say which rank failed, at which step, and by what."""
    what = said_of(error)
    if isinstance(error, PeerError) or (NOW.place and NOW.place in what):
        return what
    return f"{NOW.outside()}: {what}"


def said_of(error: BaseException) -> str:
    """Return an error's type and message."""
    return f"{type(error).__name__}: {error}"


def is_another_s(error: BaseException | None) -> bool:
    """Return whether another rank's failure ended this one, which that rank itself reports."""
    return isinstance(error, PeerError) and not error.is_first


def leave_for_launcher(error: BaseException) -> None:
    """Write the sentence where torch's elastic launcher looks for it, unless something is there."""
    path = os.environ.get(_ERROR_FILE)
    if not path or Path(path).exists():
        return
    when = int(time.time()) + is_another_s(error) * _LATER_SECONDS
    said = {"message": last_words(error), "extraInfo": {"timestamp": str(when)}}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": said}), encoding="utf-8")
