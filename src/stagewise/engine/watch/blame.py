"""Who is waited for: what ranks report, in a table and in one sentence."""

import os
import socket
import sys
import sysconfig
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from stagewise.engine.watch.now import ANY, Now

_MOST_ROWS, _FRAMES = 16, 5
_PACKAGE = str(Path(__file__).parents[2])
_LIBRARY = ("<frozen ", _PACKAGE, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))


@dataclass(frozen=True)
class Report:
    """What one rank does, since when, and whom it waits for."""

    host: str
    process: int
    seconds: float
    call: str
    doing: str
    awaits: int | None  # a rank, or ANY
    stack: str

    @staticmethod
    def of(now: Now, seconds: float) -> "Report":
        """Describe `now`, which has not changed for `seconds`."""
        awaits = now.awaits
        if not isinstance(awaits, int | None):
            awaits = awaits.source if now.numbers is None else now.numbers[awaits.source]
        return Report(
            host=socket.gethostname(),
            process=os.getpid(),
            seconds=seconds,
            call=now.when(now.call) if now.call else "",
            doing=_doing(now),
            awaits=awaits if now.call else None,
            stack=_stack(now.thread),
        )


def _doing(now: Now) -> str:
    if not now.call:
        return f"is between calls ({now.when('') or 'it has made no step'})"
    if now.awaits == ANY:
        return "waits for all ranks"
    if isinstance(now.awaits, int):
        return f"waits for rank {now.awaits}"
    if now.awaits is not None:
        before = f" before {now.instruction}" if now.instruction is not None else ""
        return f"waits for the {now.awaits}{before}"
    if now.instruction is None:
        return "is before its first instruction or after its last"
    cell = f", cell '{now.cell.name}'" if now.cell is not None else ""
    return f"is in {now.instruction}{cell}"


def culprits(reports: Mapping[int, Report | None]) -> Collection[int]:
    """Return the ranks that the others wait for: those that are silent, or wait for nobody.

    All of them if they wait for each other. None: a rank did not answer.
    """
    found = {rank for rank, report in reports.items() if report is None}
    found |= {rank for rank, said in reports.items() if said is not None and said.awaits is None}
    return found or set(reports)


def sentence(reports: Mapping[int, Report | None]) -> str:
    """Say who is waited for."""
    guilty = sorted(culprits(reports))
    if len(guilty) == len(reports) and None not in reports.values():
        return "all ranks wait for each other, or for the same transfer"
    return "; ".join(state_in_words(rank, reports[rank]) for rank in guilty[:_MOST_ROWS])


def state_in_words(rank: int, report: Report | None) -> str:
    """Say in one sentence what a rank does."""
    if report is None:
        return (
            f"rank {rank} does not answer: its process is stopped, or in C code that holds "
            "Python's lock, or its host cannot be reached"
        )
    return (
        f"rank {rank} ({report.host}, process {report.process}) {report.doing}"
        f"{f', in {report.call}' if report.call else ''}, for {report.seconds:.0f} s"
    )


def table(reports: Mapping[int, Report | None]) -> str:
    """Return a line for each rank, the culprits' marked and with their Python stacks."""
    guilty = culprits(reports)
    shown = sorted(reports, key=lambda rank: (rank not in guilty, rank))[:_MOST_ROWS]
    lines = []
    for rank in sorted(shown):
        report = reports[rank]
        lines.append(f"{'->' if rank in guilty else '  '} {state_in_words(rank, report)}")
        if rank in guilty and report is not None and report.stack:
            lines.append(report.stack)
    if len(shown) < len(reports):
        lines.append(f"   ... and {len(reports) - len(shown)} more ranks, which wait")
    return "\n".join(lines)


def _stack(thread: int) -> str:
    """Return the innermost frames of `thread`, of the user's code if there are any."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    frames = traceback.extract_stack(frame)
    own = [at for at in frames if not at.filename.startswith(_LIBRARY)]
    return "".join(traceback.format_list((own or frames)[-_FRAMES:])).rstrip()
