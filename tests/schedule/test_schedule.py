from dataclasses import replace

import pytest

from stagewise.errors import ScheduleError
from stagewise.schedule import (
    POLICIES,
    SCHEDULES,
    Schedule,
    forward_only,
    named_schedule,
    parse_programs,
    schedule_of,
    with_recompute,
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_text_form_round_trips(name: str, policy: str) -> None:
    for num_stages in range(1, 6):
        for num_microbatches in range(1, 12):
            plain = named_schedule(name, num_stages, num_microbatches)
            schedule = with_recompute(plain, policy)
            assert parse_programs(str(schedule)) == schedule.programs


def test_text_form_is_a_line_per_device() -> None:
    assert str(named_schedule("1f1b", 2, 2)) == "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ScheduleError, match="'0Z0' is no instruction"):
        parse_programs("0F0 0B0\n0Z0")


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
