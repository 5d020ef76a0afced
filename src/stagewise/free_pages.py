"""Return the pages of freed activations to the system: in steps that recompute, before looks.

Problem: gradients are allocated among activations in the C library's heap. Freed activations leave
holes between them, which stay resident: between steps a rank keeps 20 to 25 % of its peak without a
tensor living there, and at the peak itself 15 % are holes (measured with `benchmarks.resident`).
Idea: `malloc_trim` (glibc, man 3) also releases such holes. It takes milliseconds, as does faulting
the pages in again: a plan that recomputes prefers memory to time, and trims at a step's end and
after each stage's first backward, which allocates its gradients. Trimming is skipped where it would
take more than a small share of the steps' time. A look at mixing runs a cell on more samples than a
microbatch has: without trimming just before, its memory would come on top of the holes, and set the
peak of the whole run. Looks are too rare for the time to count.
"""

import ctypes
import time
from collections.abc import Callable

SHARE = 0.01  # of the steps' seconds that trimming may take; faulting in takes about as much
ADVANCE = 10.0  # the steps' seconds assumed before the first


def trim_of_glibc() -> Callable[[], object] | None:
    """Return a callable that trims the heap; None if the C library cannot."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return lambda: trim(0)


class FreePages:
    """Trims the heap after steps, as long as that is cheap compared to them."""

    def __init__(
        self,
        trim: Callable[[], object] | None,
        clock: Callable[[], float] = time.thread_time,  # not what others take of the core
    ) -> None:
        self.trim, self._clock = trim, clock
        self._step_seconds, self._spent_seconds = ADVANCE, 0.0

    def give_back(self, step_seconds: float = 0.0) -> None:
        """Call after a step that took `step_seconds`, or within one."""
        self._step_seconds += step_seconds
        if self.trim is None or self._spent_seconds > SHARE * self._step_seconds:
            return
        start = self._clock()
        self.trim()
        self._spent_seconds += self._clock() - start


HEAP = FreePages(trim_of_glibc())  # this process's
