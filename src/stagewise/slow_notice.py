"""Work that takes long is told: as it begins, or on a terminal once it took two seconds."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

AFTER_SECONDS = 2.0


@contextmanager
def told(what: str, *, every_seconds: float = 30.0) -> Iterator[None]:
    """Print on stderr that `what` goes on now and then, and on a terminal that it begins."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    if sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
    start, done = time.perf_counter(), threading.Event()

    def go_on() -> None:
        while not done.wait(every_seconds):
            seconds = time.perf_counter() - start
            print(f"{what} ... {seconds:.0f} s so far", file=sys.stderr, flush=True)

    threading.Thread(target=go_on, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextmanager
def notice_if_slow(
    what: str, *, stream: TextIO | None = None, after_seconds: float = AFTER_SECONDS
) -> Iterator[None]:
    """Print `what` is being done if it takes long; only rank 0, and only on a terminal."""
    out = sys.stderr if stream is None else stream
    if not out.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    printed = threading.Event()

    def announce() -> None:
        printed.set()
        print(f"stagewise: {what} ...", file=out, flush=True)

    timer = threading.Timer(after_seconds, announce)
    timer.daemon = True
    start = time.perf_counter()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if printed.is_set():
            seconds = time.perf_counter() - start
            print(f"stagewise: {what}: {seconds:.1f} s", file=out, flush=True)
