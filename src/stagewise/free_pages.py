"""Return the pages of freed activations to the system: in steps that recompute, before looks.

Problem: gradients are allocated among activations in the C library's heap. Freed activations leave
holes between them, which stay resident: between steps a rank keeps 20 to 25 % of its peak without a
tensor living there, and at the peak itself 15 % are holes (measured with `benchmarks.resident`).
Idea: `malloc_trim` (glibc, man 3) also releases such holes. It takes milliseconds, and faulting the
pages in again longer: a plan that recomputes prefers memory to time, and trims at a step's end and
after each stage's first backward, which allocates its gradients. The step with the most pages sets
the peak, so trimming some steps gains nothing: either all steps trim, or, where that would take
more than a small share of their time, hardly any; what a fault takes is measured once. A look at
mixing runs a cell on more samples than a microbatch has: without trimming just before, its memory
would come on top of the holes, and set the peak of the whole run. Looks are too rare for the time
to count.
"""

import ctypes
import functools
import math
import mmap
import time
from collections.abc import Callable
from pathlib import Path

import torch

SHARE = 0.01  # of a step's seconds that trimming and faulting in again may take
RARELY = 0.001  # the same of many steps, where one takes more
_PROBE_BYTES = 1 << 22


def trim_of_glibc() -> Callable[[], object] | None:
    """Return a callable that trims the heap; None if the C library cannot."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return lambda: trim(0)


def resident_bytes() -> int:
    """Return what this process has in memory; 0 where that cannot be read."""
    try:
        with Path("/proc/self/statm").open("rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def drop_pages(mapped: torch.Tensor) -> None:
    """Drop the pages of a tensor that is mapped from a file; they would be read from it again."""
    advice, start = getattr(mmap, "MADV_DONTNEED", None), mapped.data_ptr()
    first, end = (at // mmap.PAGESIZE * mmap.PAGESIZE for at in (start, start + mapped.nbytes))
    if advice is not None and first < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)


@functools.cache
def fault_seconds_per_byte() -> float:
    """Return the CPU time in which a page is faulted in, over its bytes; measured once."""
    with mmap.mmap(-1, _PROBE_BYTES) as fresh:
        pages = range(0, _PROBE_BYTES, mmap.PAGESIZE)
        start = time.thread_time()
        for place in pages:
            fresh[place] = 1
        faulted = time.thread_time()
        for place in pages:
            fresh[place] = 2
        return max(0.0, 2 * faulted - start - time.thread_time()) / _PROBE_BYTES


class FreePages:
    """Trims the heap in and after steps, where that is cheap compared to them."""

    def __init__(
        self,
        trim: Callable[[], object] | None,
        clock: Callable[[], float] = time.thread_time,  # not what others take of the core
        resident: Callable[[], int] = resident_bytes,
    ) -> None:
        self.trim, self._clock, self._resident = trim, clock, resident
        self._spent_seconds = 0.0  # in the running step
        self._resting = 0  # steps to come without trimming

    def give_back(self) -> None:
        """Trim, at once."""
        if self.trim is not None:
            self.trim()

    def within_step(self) -> None:
        """Trim, unless that has been too slow lately."""
        if self._resting or self.trim is None:
            return
        before, start = self._resident(), self._clock()
        self.trim()
        self._spent_seconds += self._clock() - start
        released = max(0, before - self._resident())
        self._spent_seconds += released * fault_seconds_per_byte()

    def after_step(self, step_seconds: float) -> None:
        """Call after a step that took `step_seconds`, with what was trimmed within."""
        if self._resting:
            self._resting -= 1
            return
        self.within_step()
        if self._spent_seconds > SHARE * step_seconds:
            self._resting = math.ceil(self._spent_seconds / (RARELY * step_seconds))
        self._spent_seconds = 0.0


HEAP = FreePages(trim_of_glibc())  # this process's
