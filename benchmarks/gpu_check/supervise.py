"""Run checks one after another; none can stop the next.

Problem: a check may hang in the driver, exhaust the GPU's memory or leave an error that every later
call of the process raises again.
Idea: each runs in a process of its own, forked from one that has imported torch but never touches
a GPU, so that a new process costs milliseconds. Its rows come through a pipe as it goes. When its
time is up, it is killed with every process that it started.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Process
from multiprocessing.connection import Connection, wait
from typing import Protocol

Row = dict[str, object]
Emit = Callable[[Row], None]


class Skipped(Exception):
    """The check cannot run here; the message completes "skipped, ..."."""


class Say(Protocol):
    """Report one row: `ok` must hold, `aim` is hoped for, the rest are figures."""

    def __call__(
        self, what: str, *, ok: bool | None = None, aim: bool | None = None, **figures: object
    ) -> None: ...


@dataclass(frozen=True)
class Check:
    """One check, and the seconds it may take."""

    name: str
    run: Callable[[Say], None]
    seconds: float


@dataclass(frozen=True)
class Ended:
    """How a check ended: "ok", or in words why not."""

    name: str
    outcome: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.outcome.startswith(("ok", "skipped"))


def run_all(checks: Sequence[Check], budget_seconds: float, emit: Emit) -> list[Ended]:
    """Run `checks` in order within the budget; `emit` gets every row, and how each check ended."""
    start, ended = time.monotonic(), list[Ended]()
    for check in checks:
        left = budget_seconds - (time.monotonic() - start)
        if left < min(5.0, check.seconds):
            last = Ended(check.name, "skipped, no time left", 0.0)
        else:
            last = run(check, min(left, check.seconds), emit)
        ended.append(last)
        emit({"check": last.name, "outcome": last.outcome, "seconds": last.seconds})
    return ended


def run(check: Check, seconds: float, emit: Emit) -> Ended:
    """Run one check in a process of its own, for at most `seconds`."""
    start, rows = time.monotonic(), list[Row]()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = Process(target=_inside, args=(check.run, sender))
    process.start()
    sender.close()
    ending = ""
    try:
        while not ending:
            left = start + seconds - time.monotonic()
            if not wait([receiver, process.sentinel], max(0.0, left)):
                ending = f"late: not done within {seconds:g} s"
                break
            ending, row = _received(receiver, process)
            if row:
                rows.append(row)
                emit({"check": check.name, **row})
    finally:
        _kill(process)
    return Ended(check.name, outcome(ending, rows), time.monotonic() - start)


def _received(receiver: Connection, process: Process) -> tuple[str, Row]:
    try:
        if receiver.poll():
            ending, row = receiver.recv()
            return str(ending), dict(row)
    except EOFError:
        pass
    process.join(10)
    return f"died: exit code {process.exitcode}", {}


def outcome(ending: str, rows: Sequence[Row]) -> str:
    """Return how a check ended, from its process's ending and its rows."""
    failed = [str(row["what"]) for row in rows if row.get("ok") is False]
    missed = [str(row["what"]) for row in rows if row.get("aim") is False]
    if failed:
        return f"failed: {'; '.join(failed)}" + ("" if ending == "ok" else f"; {ending}")
    if missed and ending == "ok":
        return f"ok, but short of the aim: {'; '.join(missed)}"
    return ending


def table(ended: Sequence[Ended]) -> str:
    """Return what passed, what did not, and how long each took."""
    lines = [f"{'check':<12}{'seconds':>8}  outcome"]
    lines += [f"{each.name:<12}{each.seconds:>8.1f}  {each.outcome}" for each in ended]
    return "\n".join(lines)


def _inside(work: Callable[[Say], None], sender: Connection) -> None:
    os.setsid()  # a group of its own, so that all its processes can be killed at once

    def say(
        what: str, *, ok: bool | None = None, aim: bool | None = None, **figures: object
    ) -> None:
        verdicts = {"ok": ok, "aim": aim}
        row = {"what": what, **{k: v for k, v in verdicts.items() if v is not None}, **figures}
        sender.send(("", row))

    try:
        work(say)
        ending = "ok"
    except Skipped as skipped:
        ending = f"skipped, {skipped}"
    except BaseException as error:
        ending = f"error: {type(error).__name__}: {shortened(error)}"
        say("traceback", lines=traceback.format_exc().strip().splitlines()[-7:])
    sender.send((ending, {}))


def shortened(error: BaseException) -> str:
    """Return an error's message; of several lines the first and the last, where NCCL says why."""
    lines = [line[:200] for line in str(error).strip().splitlines()]
    return " ... ".join([*lines[:1], *lines[1:][-1:]])


def _kill(process: Process) -> None:
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(5)  # longer only if the driver holds it
