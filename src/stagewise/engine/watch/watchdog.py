"""A thread on every rank that notices when nothing happens.

Problem: when one rank hangs, all others wait; each sees only that nothing comes, and a time-out
then names whoever it waited for, which is rarely who hangs.
Idea: a rank that waits without progress raises an alarm in the process group's store. The thread of
every rank answers with what its main thread does, even while that is blocked; the rank that raised
the alarm prints all answers, and marks whom the others wait for. That aborts nothing: the wait ends
with the process group's timeout. Only a rank that still hangs after another has failed is ended,
since nothing else would end it.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from stagewise.engine.watch.blame import Report, sentence, state_in_words, table
from stagewise.engine.watch.now import NOW, Now
from stagewise.engine.watch.shared_store import SharedStore

FAILURE = "stagewise/failure"  # in the store: why the first rank failed
WAITS = "stagewise/waits"  # in the store: who was waited for when nothing happened last
MOST_PATIENCE = 60.0  # seconds without progress before the first alarm
_ANSWER_SECONDS = 3.0  # for others to answer
HANGS_EXIT_CODE = 75  # of a process that is ended because it hangs after another has failed


class Watchdog:
    """Watches `now` on this rank; ranks wait for each other for at most `timeout`."""

    def __init__(
        self, rank: int, num_ranks: int, store: Store, timeout: timedelta, now: Now = NOW
    ) -> None:
        self._now = now
        self._rank, self._num_ranks = rank, num_ranks
        self._patience = min(MOST_PATIENCE, timeout.total_seconds() / 2)
        self._look_seconds = min(1.0, self._patience / 4)
        answering = max(self._look_seconds, min(_ANSWER_SECONDS, self._patience / 2))
        self._answering = timedelta(seconds=answering)
        self._store = SharedStore(store, self._answering)
        self._failed_before = self._store.get(FAILURE) is not None
        self._stopped = threading.Event()
        self._num_alarms, self._has_told = 0, False
        self._thread = threading.Thread(target=self._run, name="stagewise watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a thread that asks a store while Python ends would abort the process."""
        self._stopped.set()
        self._thread.join(2 * self._answering.total_seconds())
        self._store.close()

    def _run(self) -> None:
        state, since, quiet = self._now.state(), time.monotonic(), self._patience
        try:
            while not self._stopped.wait(self._look_seconds):
                if (current := self._now.state()) != state:
                    state, since, quiet = current, time.monotonic(), self._patience
                    self._goes_on()
                seconds = time.monotonic() - since
                if self._now.awaits is not None and seconds >= quiet:
                    self._store.set_first(self._key(), str(self._rank))
                if (by := self._store.get(self._key())) is not None:
                    self._answer(int(by), seconds)
                    quiet = max(quiet, seconds) + 2 * quiet
                if self._now.call and seconds >= self._patience and not self._failed_before:
                    self._end_if_failed(seconds)
        except (RuntimeError, OSError) as error:
            self._alone(state, since, str(error))

    def _key(self, rank: int | None = None) -> str:
        alarm = f"stagewise/alarm/{self._num_alarms}"
        return alarm if rank is None else f"{alarm}/{rank}"

    def _answer(self, by: int, seconds: float) -> None:
        """Answer the alarm of rank `by`; if that is this rank, print all answers."""
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

    def _goes_on(self) -> None:
        """Forget what held this rank up, and failures that it has survived."""
        self._failed_before = self._store.get(FAILURE) is not None
        if self._has_told:
            self._store.set(WAITS, "")
            self._has_told = False

    def _alone(self, state: tuple[object, ...], since: float, problem: str) -> None:
        """Without a store, say once what this rank does if it makes no progress."""
        self._stopped.wait(max(0.0, since + self._patience - time.monotonic()))
        if not self._stopped.is_set() and self._now.call and self._now.state() == state:
            own = state_in_words(self._rank, Report.of(self._now, time.monotonic() - since))
            _print(f"{own}; the process group's store does not answer ({problem})")

    def _end_if_failed(self, seconds: float) -> None:
        """End this process if another rank has failed: the run is lost, and this one hangs."""
        cause = self._store.get(FAILURE)
        if cause is not None:
            own = state_in_words(self._rank, Report.of(self._now, seconds))
            _print(f"{own}; the run has failed ({cause}), so this process is ended")
            sys.stdout.flush()
            os._exit(HANGS_EXIT_CODE)


def _print(text: str, title: str = "stagewise: ") -> None:
    print(f"{title}{text}", file=sys.stderr, flush=True)
