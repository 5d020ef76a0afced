"""Each rule broken once: the message names it, the grid marks the culprit."""

from textwrap import dedent

import pytest

from stagewise.errors import ScheduleError
from stagewise.schedule import Schedule, forward_only, named_schedule, parse_programs, validate

PLACED_IN_ORDER = ((0,), (1,))

# what -> (programs, message, grid)
BROKEN = {
    "a stage that does not exist": (
        "0F0 0F1 0B1 0B0\n1F0 1F1 2B1 1B0",
        "2B1 names a stage that is not placed",
        """
        device 0   0F0   0F1   0B1   0B0
        device 1   1F0   1F1  >2B1<  1B0
        """,
    ),
    "a microbatch out of range": (
        "0F0 0F1 0F2 0B1 0B0\n1F0 1F1 1B1 1B0",
        "0F2 names a microbatch outside 0 to 1",
        """
        device 0   0F0   0F1  >0F2<   .    0B1   0B0
        device 1    .    1F0   1F1   1B1   1B0    .
        """,
    ),
    "the wrong device": (
        "0F0 0F1 0B1 1B0\n1F0 1F1 1B1 0B0",
        "1B0 is on device 0, but stage 1 runs microbatch 0 on device 1",
        """
        device 0   0F0   0F1    .     .    0B1  >1B0<   .
        device 1    .    1F0   1F1   1B1    .     .    0B0
        """,
    ),
    "a doubled instruction": (
        "0F0 0F1 0B1 0B0\n1F0 1F1 1B1 1B0 1B1",
        "1B1 appears twice",
        """
        device 0   0F0   0F1    .     .     .     .    0B1   0B0
        device 1    .    1F0   1F1  >1B1<  1B0  >1B1<   .     .
        """,
    ),
    "a missing forward, whose backward never gets its microbatch": (
        "0F0 0F1 0B1 0B0\n1F0 1B1 1B0",
        "1F1 is missing, and other instructions wait for its microbatch 1",
        """
        device 0   0F0   0F1    .    0B1   0B0
        device 1    .    1F0  >1B1<  1B0    .
        """,
    ),
    "a microbatch that never arrives": (
        "0F0 0B0\n1F0 1F1 1B1 1B0",
        "0F1 is missing, and other instructions wait for its microbatch 1",
        """
        device 0   0F0    .     .     .     .    0B0
        device 1    .    1F0  >1F1<  1B1   1B0    .
        """,
    ),
    "a microbatch missing everywhere": (
        "0F0 0B0\n1F0 1B0",
        "0F1 is missing",
        """
        device 0  0F0  .   .  0B0
        device 1   .  1F0 1B0  .
        """,
    ),
    "a missing backward": (
        "0F0 0F1 0B1 0B0\n1F0 1F1 1B1",
        "the backward of stage 1, microbatch 0 is missing or incomplete: "
        "found none, need 1B0, or 1I0 and 1W0",
        """
        device 0   0F0   0F1    .     .    0B1  >0B0<
        device 1    .    1F0   1F1   1B1    .     .
        """,
    ),
    "half a split backward": (
        "0F0 0F1 0B1 0I0\n1F0 1F1 1B1 1B0",
        "the backward of stage 0, microbatch 0 is missing or incomplete: "
        "found I, need 0B0, or 0I0 and 0W0",
        """
        device 0  >0F0<  0F1    .     .    0B1   0I0
        device 1    .    1F0   1F1   1B1   1B0    .
        """,
    ),
    "a backward before its forward": (
        "0F0 0B1 0F1 0B0\n1F0 1F1 1B1 1B0",
        "0B1 comes before 0F1, on which it depends",
        """
        device 0   0F0  >0B1< >0F1<  0B0
        device 1   1F0   1F1   1B1   1B0
        """,
    ),
    "a recomputation after its backward": (
        "0F0 0F1 0B1 0R1 0B0\n1F0 1F1 1B1 1B0",
        "0B1 comes before 0R1, on which it depends",
        """
        device 0   0F0   0F1    .     .   >0B1< >0R1<  0B0
        device 1    .    1F0   1F1   1B1   1B0    .     .
        """,
    ),
    "a deadlock": (
        "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1",
        "deadlock: device 0 is at 0B0, waiting for the gradient of microbatch 0, "
        "stage 1 -> 0 (device 1 -> 0); device 1 is at 1F1, waiting for the activation of "
        "microbatch 1, stage 0 -> 1 (device 0 -> 1)",
        """
        device 0   0F0  >0B0<  0F1   0B1
        device 1   1F0  >1F1<  1B0   1B1
        """,
    ),
}


def schedule_of(
    text: str, placement: tuple[tuple[int, ...], ...] = PLACED_IN_ORDER, num_microbatches: int = 2
) -> Schedule:
    return Schedule(
        name="mine",
        programs=parse_programs(text),
        placement=placement,
        num_microbatches=num_microbatches,
    )


@pytest.mark.parametrize("what", BROKEN)
def test_broken_rule(what: str) -> None:
    programs, message, marked_grid = BROKEN[what]
    with pytest.raises(ScheduleError) as caught:
        validate(schedule_of(programs))
    first, _, shown = str(caught.value).partition("\n")
    assert first == f"schedule 'mine': {message}"
    assert shown == dedent(marked_grid).strip()


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (((0,), (5,)), "stage 1 is placed on device 5, but there are programs for devices 0 to 1"),
        (((0,), ()), r"stage 1 is placed on devices \(\); name each device once"),
        (((0, 0), (1,)), r"stage 0 is placed on devices \(0, 0\); name each device once"),
        (((-1,), (1,)), "stage 0 is placed on device -1"),
    ],
)
def test_wrong_placement(placement: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        validate(schedule_of("0F0 0F1 0B1 0B0\n1F0 1F1 1B1 1B0", placement))
    assert "device 0  0F0 0F1" in str(caught.value)


def test_no_microbatches() -> None:
    with pytest.raises(ScheduleError, match="num_microbatches is 0; it must be at least 1"):
        validate(schedule_of("\n", num_microbatches=0))


def test_the_first_broken_rule_is_named() -> None:
    # 1F0 appears twice *and* 0B0 is missing: doubled comes before complete.
    with pytest.raises(ScheduleError, match="1F0 appears twice"):
        validate(schedule_of("0F0 0F1 0B1\n1F0 1F0 1F1 1B1 1B0"))


def test_a_valid_schedule_is_returned() -> None:
    for schedule in (named_schedule("gpipe", 3, 4), forward_only([(d,) for d in range(3)], 4)):
        assert validate(schedule) is schedule


def test_split_backwards_and_several_stages_on_a_device_are_valid() -> None:
    validate(schedule_of("0F0 0F1 0I0 0W0 0B1\n1F0 1I0 1F1 1B1 1W0"))
    validate(schedule_of("0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1", ((0,), (0,))))


def test_replicas_are_valid() -> None:
    validate(schedule_of("0F0 0F1 0B0 0B1\n1F0 1B0\n1F1 1B1", ((0,), (1, 2))))
    with pytest.raises(ScheduleError, match="1F1 is on device 1, but stage 1 runs"):
        validate(schedule_of("0F0 0F1 0B0 0B1\n1F1 1B1\n1F0 1B0", ((0,), (1, 2))))
