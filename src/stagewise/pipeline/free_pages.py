"""The pages of freed activations go back to the system after a step that recomputes.

Problem: gradients come to lie among activations in the C library's heap. What is freed leaves holes
between them, which stay resident: between steps a rank holds nearly what it held at the peak,
though no tensor lives there (measured with `benchmarks.resident`: 20 to 25 % of it).
Idea: `malloc_trim` (glibc, man 3) gives back what lies in holes, too. It takes milliseconds, and so
does the next step's touching them anew: whoever recomputes has chosen memory, but it is left out
where it would take a share of the steps worth mentioning.
"""

import ctypes
import time
from collections.abc import Callable

SHARE = 0.0025  # of the steps' seconds that giving back may take; touching again is of that order


def trim_of_glibc() -> Callable[[], object] | None:
    """What gives pages back; None where the C library has nothing of the kind."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return lambda: trim(0)


class FreePages:
    """Gives pages back after steps, as long as that is cheap beside them."""

    def __init__(
        self,
        trim: Callable[[], object] | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._trim, self._clock = trim, clock
        self._step_seconds = self._spent_seconds = 0.0

    def give_back(self, step_seconds: float) -> None:
        """Call after a step that has taken so long."""
        self._step_seconds += step_seconds
        if self._trim is None or self._spent_seconds > SHARE * self._step_seconds:
            return
        start = self._clock()
        self._trim()
        self._spent_seconds += self._clock() - start
