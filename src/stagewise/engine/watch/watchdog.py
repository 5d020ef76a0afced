"""A thread on every rank that notices when nothing happens.

Problem: when one rank hangs, all others wait; each sees only that nothing comes, and a time-out
then names whoever it waited for, which is rarely who hangs.
Idea: a rank that waits without progress raises an alarm in the process group's store. The thread of
every rank answers with what its main thread does, even while that is blocked; the rank that raised
the alarm prints all answers, and marks whom the others wait for. Nothing is aborted yet: a wait
ends with the process group's timeout, by an error that the caller sees. Where that does not end it,
the thread ends the process: a rank that waits on for longer than the limit, and one that makes no
progress after another rank has failed.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from stagewise.engine.watch import collectives
from stagewise.engine.watch.blame import Report, sentence, state_in_words, table
from stagewise.engine.watch.last_words import leave_for_launcher
from stagewise.engine.watch.now import NOW, Now
from stagewise.engine.watch.shared_store import SharedStore, StoreGone, in_time
from stagewise.errors import PeerError

FAILURE = "stagewise/failure"  # in the store: why the first rank failed
ALONE = "stagewise/alone"  # in the store: why a rank failed, in a call that may yet be undone
WAITS = "stagewise/waits"  # in the store: who was waited for when nothing happened last
MOST_PATIENCE = 60.0  # seconds without progress before the first alarm
_ANSWER_SECONDS = 3.0  # for others to answer
_GRACE_SECONDS = 5.0  # for errors that the timeout raises, and after another rank's failure
_MOST_LATE = 3  # looks in a row without an answer of the store, before it is given up
_LOOKS_INSIDE = 2  # in a row, in a collective, before a failure is that of the whole run
_ABORT_SECONDS = 2.0  # an abort may wait for others
HANGS_EXIT_CODE = 75  # of a process that is ended because it hangs


class Watchdog:
    """Watches `now` on this rank; ranks wait for each other for at most `timeout`.

    `abort` ends this rank's transfers, before the process is ended; `interrupt` its waits, so that
    its calls raise.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        store: Store,
        timeout: timedelta,
        now: Now = NOW,
        abort: Callable[[], None] = lambda: None,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._now, self._abort, self._interrupt = now, abort, interrupt
        self._num_inside, self._is_interrupted = 0, False
        self._rank, self._num_ranks = rank, num_ranks
        self._limit = timeout.total_seconds() + _GRACE_SECONDS  # then a rank that waits is ended
        self._patience = min(MOST_PATIENCE, timeout.total_seconds() / 2)
        self._grace = min(_GRACE_SECONDS, self._patience)
        self._look_seconds = min(1.0, self._patience / 4)
        answering = max(self._look_seconds, min(_ANSWER_SECONDS, self._patience / 2))
        self._answering = timedelta(seconds=answering)
        self._store = SharedStore(store, self._answering)
        self._known = self._store.get(FAILURE)  # at the look before
        self._failed_before = self._known is not None
        self._stopped = threading.Event()
        self._num_alarms, self._has_told, self._was_asked = 0, False, False
        self._quiet, self._failed_at = self._patience, 0.0
        self._goes_on(self._now.state())
        self._thread = threading.Thread(target=self._run, name="stagewise watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a thread that asks a store while Python ends would abort the process."""
        self._stopped.set()
        self._thread.join(2 * self._answering.total_seconds())
        self._store.close()

    def _run(self) -> None:
        problem, num_late = "", 0
        while num_late < _MOST_LATE and not self._stopped.wait(self._look_seconds):
            try:
                self._look()
                num_late = 0
            except (RuntimeError, OSError) as error:
                problem, num_late = str(error), num_late + 1
        self._alone(problem)

    def _look(self) -> None:
        by, cause, alone = self._store.get_each(self._key(), FAILURE, ALONE)
        if (current := self._now.state()) != self._state:
            self._goes_on(current)
            self._failed_before = self._known is not None  # and this rank has survived it
            if self._has_told:
                self._store.set(WAITS, "")
                self._has_told = False
        seconds = time.monotonic() - self._since
        if alone:
            self._look_beside(alone, cause, seconds)
        if by is None and self._now.awaits is not None and seconds >= self._quiet:
            self._store.set_first(self._key(), str(self._rank))
            by = self._store.get(self._key())
        if by is not None:
            self._answer(int(by), seconds)
            self._quiet = max(self._quiet, seconds) + 2 * self._quiet
        if self._now.awaits is not None and seconds >= self._limit:
            self._end(f"the run is ended: {self._store.get(WAITS) or 'nobody was reported'}")
        if cause is not None and not self._failed_before:
            if not self._failed_at and self._is_elsewhere(cause):
                _print(f"the run has failed ({cause}), while this rank runs code of its own")
            self._failed_at = self._failed_at or time.monotonic()
            self._end_if_it_hangs(cause, seconds)
        self._known = cause

    def _look_beside(self, alone: str, cause: str | None, seconds: float) -> None:
        """End all waits of a run in which a rank fails, by `alone`, that a collective waits for."""
        if cause is None:
            inside = collectives.is_in_collective(self._now)
            if seconds >= _GRACE_SECONDS:  # as for a kernel, or a handle of the user's
                inside = inside or (bool(self._now.call) and self._now.awaits is None)
            self._num_inside = self._num_inside + 1 if inside else 0
            if self._num_inside >= _LOOKS_INSIDE:
                self._store.set_first(FAILURE, alone)
                _print(f"{self._own(seconds)}, in a collective; the run has failed ({alone})")
        elif cause == alone and not self._is_interrupted:
            self._is_interrupted = True
            self._interrupt()

    def _goes_on(self, state: tuple[object, ...]) -> None:
        """Forget what held this rank up."""
        self._state, self._since, self._quiet = state, time.monotonic(), self._patience
        self._was_asked, self._failed_at = False, 0.0

    def _key(self, rank: int | None = None) -> str:
        alarm = f"stagewise/alarm/{self._num_alarms}"
        return alarm if rank is None else f"{alarm}/{rank}"

    def _answer(self, by: int, seconds: float) -> None:
        """Answer the alarm of rank `by`; if that is this rank, print all answers."""
        self._was_asked = True
        self._store.set(self._key(self._rank), json.dumps(asdict(Report.of(self._now, seconds))))
        if by == self._rank:
            answers = self._answers()
            self._store.set(WAITS, sentence(answers))
            self._has_told = True
            _print(f"no progress for {seconds:.0f} s; what each rank does (-> is waited for):")
            _print(table(answers), title="")
        self._num_alarms += 1

    def _answers(self) -> dict[int, Report | None]:
        """Return every rank's report, None for those that do not answer in time."""
        answers: dict[int, Report | None] = dict.fromkeys(range(self._num_ranks))
        deadline = time.monotonic() + self._answering.total_seconds()
        while None in answers.values() and time.monotonic() < deadline:
            for rank in [rank for rank, known in answers.items() if known is None]:
                if (said := self._store.get(self._key(rank))) is not None:
                    answers[rank] = Report(**json.loads(said))
            self._stopped.wait(self._look_seconds / 4)
        return answers

    def _end_if_it_hangs(self, cause: str, seconds: float) -> None:
        """End this process if it makes no progress after another rank's failure, of `cause`.

        Between calls the user's code may go on, unless it was waited for, or is our loop's.
        """
        is_in_run = self._now.call or self._was_asked or self._now.is_numbered
        if is_in_run and time.monotonic() - max(self._failed_at, self._since) >= self._grace:
            self._end(f"the run has failed ({cause}), so this process is ended")

    def _is_elsewhere(self, cause: str) -> bool:
        """Whether this rank, which has not failed, is between calls in a script of the user's."""
        is_own = bool(self._now.place) and self._now.place in cause
        return not (is_own or self._now.call or self._now.is_numbered)

    def _alone(self, problem: str) -> None:
        """Without a store, tell what this rank does if it makes no progress, and end it at last."""
        has_told = False
        while not self._stopped.wait(self._look_seconds):
            if (current := self._now.state()) != self._state:
                self._goes_on(current)
                has_told = False
            seconds = time.monotonic() - self._since
            if self._now.call and seconds >= self._limit:
                self._end(f"the process group's store does not answer ({problem})")
            if self._now.call and seconds >= self._patience and not has_told:
                has_told = True
                store = f"the process group's store does not answer ({problem})"
                _print(f"{self._own(seconds)}; {store}")

    def _own(self, seconds: float) -> str:
        return state_in_words(self._rank, Report.of(self._now, seconds))

    def _end(self, why: str) -> None:
        """Tell what this rank does, and end its process."""
        text = f"{self._own(time.monotonic() - self._since)}; {why}"
        _print(text)
        with suppress(RuntimeError, OSError):
            self._store.set_first(FAILURE, f"rank {self._rank}: {text}")
        failure = PeerError(text)
        failure.is_first = True
        leave_for_launcher(failure)
        with suppress(StoreGone):
            in_time(self._abort, _ABORT_SECONDS)
        sys.stdout.flush()
        os._exit(HANGS_EXIT_CODE)


def _print(text: str, title: str = "stagewise: ") -> None:
    print(f"{title}{text}", file=sys.stderr, flush=True)
