"""Text that people write and edit; that all schedules round-trip is in `test_contract.py`."""

import pytest

from stagewise.errors import ScheduleError
from stagewise.schedule import Schedule, grid, named_schedule, parse_programs, parse_schedule


def test_text_form_is_a_line_per_device() -> None:
    assert str(named_schedule("1f1b", 2, 2)) == "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


def test_labels_dots_comments_and_empty_lines_are_for_people() -> None:
    text = """
        # two devices

        device 0:  0F0  .   .  0B0   # the first stage
        device 1    .  1F0 1B0
    """
    assert parse_programs(text) == parse_programs("0F0 0B0\n1F0 1B0")


@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_device_without_instructions_is_kept(idle: int) -> None:
    """It was lost at either end."""
    programs = [*parse_programs("0F0 0B0\n1F0 1B0")]
    programs.insert(idle, ())
    placement = tuple((d + (d >= idle),) for d in range(2))
    schedule = Schedule(
        name="idle", programs=tuple(programs), placement=placement, num_microbatches=1
    )
    for text in (str(schedule), grid(schedule)):
        assert parse_programs(text) == schedule.programs
        assert parse_schedule("idle", text) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0\n\n0F1 0Z1", "line 3: '0Z1' is not an instruction; write the stage, one letter"),
        ("device 0 0F0\ndevice 2 1F0", "line 2 is for device 2, but device 1 comes next"),
        ("device 0", "line 1: 'device' is not an instruction"),
    ],
)
def test_what_is_no_program_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_programs(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0W0", r"schedule 'mine': the backward of stage 0.*found W(?s:.*)>0F0<"),
        ("0F0 2F0", r"schedule 'mine' has no instruction of stages \[1\]"),
        ("# nothing", "schedule 'mine' has no instructions"),
        ("0F0 O", "schedule 'mine': line 1: 'O' is not an instruction"),
        ("0B0 0F0", r"schedule 'mine': 0B0 comes before 0F0(?s:.*)>0B0< >0F0<"),
    ],
)
def test_a_schedule_that_is_wrong_is_shown(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_schedule("mine", text)


def test_columns_are_slots_of_time() -> None:
    assert grid(named_schedule("gpipe", 2, 2)) == (
        "device 0  0F0 0F1  .   .  0B1 0B0\n"  #
        "device 1   .  1F0 1F1 1B1 1B0  ."
    )


def test_marked_instructions_stand_between_angles() -> None:
    assert grid(named_schedule("gpipe", 2, 1), [(1, 0), (0, 1)]) == (
        "device 0   0F0    .     .   >0B0<\n"  #
        "device 1    .   >1F0<  1B0    ."
    )


def test_columns_are_positions_where_there_is_no_time() -> None:
    blocked = Schedule(
        name="circle",
        programs=parse_programs("0B0 0F0\n1F0 1B0"),
        placement=((0,), (1,)),
        num_microbatches=1,
    )
    assert grid(blocked) == "device 0  0B0 0F0\ndevice 1  1F0 1B0"


def test_labels_and_cells_are_aligned() -> None:
    lines = grid(named_schedule("1f1b", 11, 12)).splitlines()
    assert lines[0].startswith("device  0   0F0   0F1 ")
    assert lines[10].startswith("device 10    .     .  ")
    column = lines[10].index("10F0")
    assert lines[9][column - 6 : column + 5].split() == ["9F0", "9F1"]
    assert lines[9][column - 6 : column - 3] == "9F0"


def test_a_device_may_have_nothing_to_do() -> None:
    idle = Schedule(
        name="idle",
        programs=(*parse_programs("0F0 0B0"), ()),
        placement=((0,),),
        num_microbatches=1,
    )
    assert grid(idle) == "device 0  0F0 0B0\ndevice 1   .   ."
