"""Help and complaints are in words of the command's users."""

import re

import pytest
from typer.testing import CliRunner

from stagewise.cli.main import COMMANDS, command_app


@pytest.mark.parametrize(
    ("command", "line", "says"),
    [
        ("schedules", "-K two", "not a whole number, such as 4"),
        ("schedules", "-K 0", "it must be at least 1"),
        ("schedules", "--stages 4", "Possible options: --devices, --json, --microbatches"),
        ("simulate", "--latency x", "not a number, such as 0.5"),
        ("train", "x.py --record 101", "it must be at most 100"),
    ],
)
def test_a_wrong_value_is_told_plainly(command: str, line: str, says: str) -> None:
    told = CliRunner().invoke(command_app(command), line.split(), env={"COLUMNS": "200"})
    assert told.exit_code == 2 and says in told.output and "Input should" not in told.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_no_types_of_python(command: str) -> None:
    told = CliRunner().invoke(command_app(command), ["--help"], env={"COLUMNS": "200"})
    assert told.exit_code == 0
    shown = re.findall(r"<[a-z ]+[>\[]|\[[0-9.]*(?:<=)?x[<>].*?\]", told.output)
    assert shown == []
