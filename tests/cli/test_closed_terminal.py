"""A closed terminal raises no error, then or when Python flushes at its end."""

import os
import pty

import pytest
from rich.console import Console

from stagewise.cli.closed_terminal import Terminal


def test_what_is_written_to_a_closed_terminal_is_dropped() -> None:
    theirs, ours = pty.openpty()
    with os.fdopen(ours, "w") as file:
        console = Console(file=Terminal(file))  # type: ignore[arg-type]
        assert console.is_terminal
        console.print("seen")
        assert b"seen" in os.read(theirs, 100)
        os.close(theirs)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(ours, b"lost")
        console.print("lost")
        console.print("lost again")


def test_other_errors_are_raised() -> None:
    with open("/dev/full", "w") as full, pytest.raises(OSError, match="No space"):
        print("x" * 100_000, file=Terminal(full))  # type: ignore[arg-type]
        full.detach().raw.close()
