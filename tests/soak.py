"""How many generated cases: the suite's few hundred, always the same, or a soak's thousands.

`make soak` sets STAGEWISE_SOAK to a factor, and draws new cases each time; hypothesis prints
how to repeat one that fails.
"""

import os
from collections.abc import Callable
from typing import Any

import hypothesis

FACTOR = int(os.environ.get("STAGEWISE_SOAK", "1"))


def examples(number: int) -> int:
    """For `hypothesis.settings(max_examples=...)`."""
    return number * FACTOR


def part_of(number: int) -> Callable[[Any], Any]:
    """Draw other cases in each part of a test that would take too long in one, but always the same.

    A soak draws new ones anyway.
    """
    return hypothesis.seed(number) if FACTOR == 1 else lambda test: test
