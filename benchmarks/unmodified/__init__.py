"""Unmodified models of other libraries, in tiny configurations; `ENTRIES` is the table's list.

1. `entry` says what an entry is, and holds the batches and losses that they share.
2. `language`, `vision` and `others` list the models, one entry each.
"""

from benchmarks.unmodified.entry import Batch, Entry
from benchmarks.unmodified.language import LANGUAGE
from benchmarks.unmodified.others import OTHERS
from benchmarks.unmodified.vision import VISION

ENTRIES = [*LANGUAGE, *VISION, *OTHERS]

__all__ = ["ENTRIES", "Batch", "Entry"]
