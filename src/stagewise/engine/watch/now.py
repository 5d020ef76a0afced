"""What this process is doing, for a thread that looks while it is blocked.

Noting it must cost nothing: plain attributes, set where it is known.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from stagewise.schedule import Instruction, Message

ANY = -1  # waits for all ranks at once
STEP = "step"  # the call that trains


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
    place: str = ""  # "rank 1 on node2", once ranks are connected
    step: int | None = None  # training step begun last
    is_numbered: bool = False  # by a loop around the pipeline, in place of `pipe.step_index`
    kind: str = ""  # of the call begun last
    stages: tuple[int, ...] = ()  # this rank's, in that call
    numbers: Sequence[int] | None = None  # what the ranks of a pipeline on a mesh are called

    def state(self) -> tuple[object, ...]:
        """Return what differs after any progress; it may be kept, so no cell is in it."""
        cell = None if self.cell is None else self.cell.name
        return self.count, self.call, self.instruction, cell, self.awaits

    def when(self, call: str) -> str:
        """Say which step `call` belongs to ("": no call runs)."""
        if self.step is None:
            return call
        if call == STEP or (not call and self.is_numbered):
            return f"step {self.step}"
        return f"{call} after step {self.step}".lstrip()

    def here(self, call: str) -> str:
        """Say when and where `call` runs: "step 3, rank 1 on node2"; "" if nothing is known."""
        return ", ".join(part for part in (self.when(call), self.place) if part)

    def outside(self) -> str:
        """Say where this process is between two calls: "rank 1 on node2, stage 1, after step 3"."""
        numbers = ", ".join(map(str, self.stages))
        stages = f"stage{'s' * (len(self.stages) > 1)} {numbers}" if numbers else ""
        return ", ".join(part for part in (self.place, stages, self.when("")) if part)

    def beside(self) -> str:
        """Return `here` of the pipeline's call, to go on after other words."""
        found = self.here(self.kind)
        return f", {found}" if found else ""

    @contextmanager
    def numbered(self) -> Iterator[None]:
        """Inside, the caller sets `step`."""
        self.step, self.is_numbered = None, True
        try:
            yield
        finally:
            self.is_numbered = False  # a failure is told after this, with its step

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
