import subprocess
import sys

import pytest
from typer.testing import CliRunner

import stagewise
from stagewise.cli import main as cli
from stagewise.errors import PeerError, UsageError

RUNNER = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


def fails_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    def command(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_wrong_use_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UsageError("got [red]3[/red], need 4; " + "long " * 50 + "end")
    assert fails_with(error, monkeypatch) == 2
    output = capsys.readouterr()
    assert output.err == f"error: {error}\n"
    assert output.out == ""


def test_another_failure_has_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails_with(PeerError("rank 1 failed"), monkeypatch) == 1
    assert capsys.readouterr().err == "error: rank 1 failed\n"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        fails_with(ZeroDivisionError(), monkeypatch)


def test_help_lists_every_command() -> None:
    for arguments in ([], ["--help"]):
        result = RUNNER.invoke(cli.app, arguments)
        assert result.exit_code == 0
        for name, command in cli.COMMANDS.items():
            assert name in result.stdout
            assert command.help[:40] in result.stdout


def test_version() -> None:
    result = RUNNER.invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"stagewise {stagewise.__version__}\n")


def test_arguments_and_help_reach_the_command() -> None:
    result = RUNNER.invoke(cli.app, ["simulate", "--stages", "2", "--microbatches", "1", "--text"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == [
        "device 0  0F0  .   .  0B0",
        "device 1   .  1F0 1B0  .",
    ]
    assert "--microbatches" in RUNNER.invoke(cli.app, ["simulate", "--help"]).stdout


@pytest.mark.parametrize("arguments", [["bake"], ["simulate", "--oven"], ["--oven"]])
def test_what_typer_refuses_has_exit_code_2(arguments: list[str]) -> None:
    assert RUNNER.invoke(cli.app, arguments).exit_code == 2


def test_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "stagewise", "simulate", "--schedule", "zb_v", "--stages", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: zb_v has 2 stages on each device, so 3 stages are not possible; use a "
        "multiple of 2\n"
    )
