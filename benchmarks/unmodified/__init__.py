"""Unmodified models of other libraries, in tiny configurations; `ENTRIES` is the table's list.

1. `entry` says what an entry is, and holds the batches and losses that they share.
2. `comparisons` makes a row of the table, `processes` gives it processes of its own.
3. Of transformers: `decoders`, `mixtures`, `encoders`, `translators` for text, `images`,
   `sounds`, `pictures` (with text), `series` (of numbers).
4. `convolutions` (timm, torchvision), `diffusion` (diffusers), `adapters` (PEFT).
5. `further` has more of transformers and timm, tried later.
6. `plain` lists models of plain torch, which `by_hand` writes.
"""

import dataclasses

from benchmarks.unmodified.adapters import ADAPTERS
from benchmarks.unmodified.convolutions import TIMM, TORCHVISION
from benchmarks.unmodified.decoders import DECODERS
from benchmarks.unmodified.diffusion import DIFFUSION
from benchmarks.unmodified.encoders import ENCODERS
from benchmarks.unmodified.entry import Batch, Entry
from benchmarks.unmodified.further import FURTHER
from benchmarks.unmodified.images import IMAGES
from benchmarks.unmodified.mixtures import MIXTURES
from benchmarks.unmodified.pictures import PICTURES
from benchmarks.unmodified.plain import PLAIN
from benchmarks.unmodified.series import SERIES
from benchmarks.unmodified.sounds import SOUNDS
from benchmarks.unmodified.translators import TRANSLATORS

_SLOW = [*DECODERS, *MIXTURES, *ENCODERS, *TRANSLATORS, *TIMM, *DIFFUSION, *ADAPTERS, *FURTHER]
_EVERY = 6  # of those that take long to capture runs in two processes
ENTRIES = [
    *(dataclasses.replace(e, processes=not i % _EVERY) for i, e in enumerate(_SLOW)),
    *(*IMAGES, *TORCHVISION, *SOUNDS, *PICTURES, *SERIES, *PLAIN),
]

__all__ = ["ENTRIES", "Batch", "Entry"]
