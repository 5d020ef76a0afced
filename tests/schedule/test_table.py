"""Asking for schedules by name; what they are is in `test_contract.py`."""

import pytest

from stagewise.errors import ScheduleError
from stagewise.schedule import (
    SCHEDULES,
    forward_only,
    grid,
    named_schedule,
    stages_per_device,
    validate,
)


def test_forward_only_grid() -> None:
    assert grid(validate(forward_only([(d,) for d in range(2)], 3))) == (
        "device 0  0F0 0F1 0F2  .\ndevice 1   .  1F0 1F1 1F2"
    )


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match="no schedule 'pipedream'; choose one of 1f1b, breadth"):
        named_schedule("pipedream", 2, 2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("num_stages", "num_microbatches", "message"),
    [
        (0, 4, "num_devices is 0; a schedule needs at least 1"),
        (2, 0, "num_microbatches is 0; a schedule needs at least 1"),
        (-1, 1, "num_devices is -1"),
    ],
)
def test_counts_below_one_are_refused(
    name: str, num_stages: int, num_microbatches: int, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        named_schedule(name, num_stages, num_microbatches)


def test_stages_per_device_are_the_rows_unless_it_takes_any() -> None:
    assert stages_per_device("interleaved") == stages_per_device("zb_v", 2) == 2
    assert stages_per_device("breadth_first", 5) == 5
    assert named_schedule("interleaved", 2, 3, 4).num_stages == 8
    with pytest.raises(ScheduleError, match=r"v_min was asked for 3 stages .* needs exactly 2"):
        stages_per_device("v_min", 3)
    with pytest.raises(ScheduleError, match=r"interleaved was asked for 0 .* needs at least 1"):
        stages_per_device("interleaved", 0)
