"""What takes long says so, and only where a person would see it."""

import io
import threading

import pytest

from stagewise.slow_notice import notice_if_slow, told


class Terminal(io.StringIO):
    """A terminal that lets the test know when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.written.set()


def test_it_is_said_while_it_lasts_and_how_long_it_took() -> None:
    out = Terminal()
    with notice_if_slow("measuring", stream=out, after_seconds=0):
        assert out.written.wait(30)
        assert out.getvalue() == "stagewise: measuring ...\n"
    assert out.getvalue().splitlines()[1].startswith("stagewise: measuring: ")
    assert out.getvalue().endswith(" s\n")


def test_what_is_soon_over_says_nothing() -> None:
    out = Terminal()
    with notice_if_slow("measuring", stream=out, after_seconds=60):
        pass
    assert out.getvalue() == ""


def test_nothing_is_said_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with notice_if_slow("measuring", stream=out, after_seconds=0):
        pass
    monkeypatch.setenv("RANK", "1")
    terminal = Terminal()
    with notice_if_slow("measuring", stream=terminal, after_seconds=0):
        pass
    assert out.getvalue() == terminal.getvalue() == ""


def test_what_takes_long_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with told("measuring", every_seconds=0.01):
        while "so far" not in (said := capsys.readouterr().err):
            threading.Event().wait(0.01)
    assert "measuring ... 0 s so far\n" in said
