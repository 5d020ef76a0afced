"""`stagewise schedules`: all of them, for the same devices and microbatches."""

import json

import pytest

from stagewise.schedule import SCHEDULES
from tests.recipes import RunHere


def test_all_schedules_are_drawn_smallest_bubble_first(run_here: RunHere) -> None:
    code, out, _ = run_here("schedules", "-K", "2", "-M", "4")
    assert code == 0
    for name in SCHEDULES:
        assert f"{name}  bubble" in out
    found = json.loads(run_here("schedules", "-K", "2", "-M", "4", "--json")[1])
    bubbles = [each["bubble_fraction"] for each in found]
    assert bubbles == sorted(bubbles)
    (gpipe,) = (each for each in found if each["schedule"] == "gpipe")
    assert gpipe["bubble_fraction"] == pytest.approx(1 / 5, rel=1e-12)  # (K - 1) / (M + K - 1)
    assert gpipe["step_seconds"] == 15 and gpipe["most_in_flight"] == 4


def test_numbers_that_are_too_large_are_refused(run_here: RunHere) -> None:
    assert run_here("schedules", "-K", "3", "-M", "1")[0] == 0
    code, _, err = run_here("schedules", "-K", "100", "-M", "1000")
    assert code == 2 and "too many to draw" in err
