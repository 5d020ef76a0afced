"""How many generated cases: the suite's few hundred, always the same, or a soak's thousands.

`make soak` sets STAGEWISE_SOAK to a factor, and draws new cases each time; hypothesis prints
how to repeat one that fails.
"""

import os

FACTOR = int(os.environ.get("STAGEWISE_SOAK", "1"))


def examples(number: int) -> int:
    """For `hypothesis.settings(max_examples=...)`."""
    return number * FACTOR
