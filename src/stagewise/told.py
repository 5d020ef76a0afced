"""What takes long says so: on a terminal, once two seconds have gone by, and how long it took."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

AFTER_SECONDS = 2.0


@contextmanager
def told(
    what: str, *, stream: TextIO | None = None, after_seconds: float = AFTER_SECONDS
) -> Iterator[None]:
    """Say `what` is being done, if it takes longer; by rank 0, where stderr is a terminal."""
    out = sys.stderr if stream is None else stream
    if not out.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    said = threading.Event()

    def say() -> None:
        said.set()
        print(f"stagewise: {what} ...", file=out, flush=True)

    timer = threading.Timer(after_seconds, say)
    timer.daemon = True
    start = time.perf_counter()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said.is_set():
            seconds = time.perf_counter() - start
            print(f"stagewise: {what}: {seconds:.1f} s", file=out, flush=True)
