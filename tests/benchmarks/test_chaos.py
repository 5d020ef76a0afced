"""Twenty faults of `make chaos`; workers are forked, which spares their imports.

What the launcher does is left to `make chaos` and tests/training/workers.
"""

import random
from functools import cache

import pytest

import tests.harness  # noqa: F401 (its processes have imported what these need)
from benchmarks.chaos.damage import try_damage
from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.forked import forked
from benchmarks.chaos.trial import LAYOUTS, Place, Weights, try_fault, undisturbed

_OF_LAUNCHER = ("kill_parent", "end_parent")
SHAPES = "2 stages", "replicas 1,2", "2 stages", "4 stages"
_LIKE_OTHERS = ("SIGKILL in data", "SIGKILL in optimizer", "sys.exit", "NaN in backward")
# Those that only the watchdog ends take longer than all others together; what ranks may call is
# tried in tests/pipeline/test_other_calls.py.
QUICK = [
    fault
    for fault in FAULTS
    if not (fault.hangs or fault.in_loop or fault.how in _OF_LAUNCHER)
    and fault.name not in _LIKE_OTHERS
]


@cache
def expected(layout: str) -> Weights:
    return undisturbed(LAYOUTS[layout], forked)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", range(len(QUICK)))
def test_a_fault_is_named_and_nothing_is_lost(number: int) -> None:
    fault = QUICK[number]
    layout = LAYOUTS[SHAPES[number % len(SHAPES)]]
    if fault.damage:
        outcome = try_damage(fault, layout, expected(layout.name), forked)
    else:
        place = Place.drawn(fault, layout, random.Random(number))
        outcome = try_fault(fault, layout, place, expected(layout.name), forked)
    found = outcome.named, outcome.resumed, outcome.difference, outcome.left_behind
    assert found == (True, True, 0.0, 0), outcome.text
