from dataclasses import replace

import pytest

from stagewise.errors import ScheduleError
from stagewise.schedule import (
    Schedule,
    forward_only,
    named_schedule,
    parse_programs,
    schedule_of,
)


def test_replicas_share_microbatches_in_turn() -> None:
    schedule = Schedule(
        name="replicas",
        programs=parse_programs("0F0 0F1 0F2\n1F0 1F2\n1F1"),
        placement=((0,), (1, 2)),
        num_microbatches=3,
    )
    assert [schedule.device_of(1, m) for m in range(3)] == [1, 2, 1]
    assert [schedule.stages_of(device) for device in range(3)] == [(0,), (1,), (1,)]
    assert (schedule.num_devices, schedule.num_stages) == (3, 2)


def test_has_backward() -> None:
    assert named_schedule("gpipe", 2, 2).has_backward
    assert not forward_only([(d,) for d in range(2)], 2).has_backward


def test_programs_say_where_their_stages_are() -> None:
    replicated = schedule_of("mine", parse_programs("0F0 0F1 2F1\n1F1 1B1\n1F0 2F0"))
    assert replicated.placement == ((0,), (2, 1), (2, 0))
    assert replicated.num_microbatches == 2
    assert schedule_of("again", parse_programs(str(replicated))) == replace(
        replicated, name="again"
    )


@pytest.mark.parametrize(
    "text, message", [("0F0 2F0", "no instruction of stages \\[1\\]"), ("", "has no instructions")]
)
def test_programs_that_leave_a_stage_out(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule_of("mine", parse_programs(text))
