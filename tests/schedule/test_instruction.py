import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewise.errors import ScheduleError
from stagewise.schedule import Instruction, Kind

INSTRUCTIONS = st.builds(
    Instruction, st.integers(0, 200), st.sampled_from(Kind), st.integers(0, 5000)
)


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("2F0", Instruction(2, Kind.FORWARD, 0)),
        ("0B13", Instruction(0, Kind.BACKWARD, 13)),
        ("10I7", Instruction(10, Kind.BACKWARD_INPUT, 7)),
        ("1W1", Instruction(1, Kind.BACKWARD_WEIGHT, 1)),
        ("3R2", Instruction(3, Kind.RECOMPUTE, 2)),
    ],
)
def test_text_form(text: str, instruction: Instruction) -> None:
    assert str(instruction) == text
    assert Instruction.parse(text) == instruction


@given(INSTRUCTIONS)
def test_text_form_round_trips(instruction: Instruction) -> None:
    assert Instruction.parse(str(instruction)) == instruction


@pytest.mark.parametrize("text", ["", "F", "2F", "F0", "2f0", "2X0", "-1F0", "2F0 ", "2F0B1"])
def test_what_is_no_instruction_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="is no instruction; write stage, one letter of FBIWR"):
        Instruction.parse(text)
