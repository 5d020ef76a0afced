"""Output that survives its terminal: a run goes on to its checkpoint when the window is closed.

Problem: workers have sessions of their own, so SIGHUP does not reach them; they write on, and every
write raises EIO. Idea: from the first such error on, the process writes to nowhere.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


class Terminal:
    """The file `file`, for as long as it has a terminal behind it if it is one."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write as the file does."""
        with self._until_closed():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as the file does."""
        with self._until_closed():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextmanager
    def _until_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
