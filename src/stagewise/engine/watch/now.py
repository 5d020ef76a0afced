"""What this process is doing, for a thread that looks while it is blocked.

Noting it must cost nothing: plain attributes, set where it is known.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from stagewise.schedule import Instruction, Message

ANY = -1  # waits for all ranks at once


class Named(Protocol):
    """A cell."""

    @property
    def name(self) -> str: ...


@dataclass(slots=True)
class Now:
    """Where this process is. `count` makes the next call look different."""

    count: int = 0
    thread: int = 0  # that made the call
    agreed: str = ""  # the last call that ranks agreed on
    call: str = ""  # that runs, "": none
    instruction: Instruction | None = None  # that runs, or waits for its messages
    cell: Named | None = None  # that runs forward
    awaits: Message | int | None = None  # a message, or a rank

    def state(self) -> tuple[object, ...]:
        """Return what differs after any progress."""
        return self.count, self.call, self.instruction, self.cell, self.awaits

    def begin(self) -> None:
        """The call that was agreed on runs from here on."""
        self.count, self.call = self.count + 1, self.agreed

    def end(self) -> None:
        """No call runs."""
        self.call, self.instruction, self.cell, self.awaits = "", None, None, None

    @contextmanager
    def agreeing(self, call: str) -> Iterator[None]:
        """Wait inside for all ranks to make `call`."""
        before, self.thread = self.call, threading.get_ident()
        self.count, self.call, self.agreed = self.count + 1, call, call
        try:
            yield
        finally:
            self.call, self.awaits = before, None


NOW = Now()
