"""How long the thread had a core in each instruction, from few readings of its clock.

Reading it enters the kernel, so it is not read after every short instruction. Who loses a core
loses it for milliseconds, so readings half a millisecond apart still tell where.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

EVERY_SECONDS = 5e-4
Moment = tuple[float, float]  # by the wall clock, and by the thread's
Span = tuple[float, float]


def cpu_seconds(spans: Sequence[Span], readings: Sequence[Moment]) -> Iterator[tuple[float, float]]:
    """Yield for each of `spans`, in order, its CPU seconds and those since the one before.

    What the thread had between two readings counts for the spans there first, in proportion to
    their lengths. The rest may be of any gap between them, so it counts for each.
    """
    at = 0
    for (_, before), (until, now) in pairwise(readings):
        first = at
        while at < len(spans) and spans[at][1] <= until:
            at += 1
        lengths = [end - start for start, end in spans[first:at]]
        had, length = now - before, sum(lengths)
        share = min(1.0, had / length) if length else 1.0
        yield from ((share * each, max(0.0, had - length)) for each in lengths)
