"""A run that goes on after a fault: what it had done, and what the fault has cost."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stagewise.training.progress import (
    LOG_FILE,
    ChangeRecord,
    Reporter,
    StepRecord,
    ValidationRecord,
)


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """Where a run was when it was interrupted: its last step, and when that ended."""

    last_step: int
    when: float  # seconds since the epoch
    restart: int  # its number, 0 if workers came or went without a failure

    @staticmethod
    def of(run: Path, restart: int) -> "Interrupted":
        """Read the log of the folder `run`."""
        last, when = 0, time.time()
        with suppress(OSError):
            log = run / LOG_FILE
            when = log.stat().st_mtime
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    last = max(last, int(json.loads(line)["step"]))
        return Interrupted(last_step=last, when=when, restart=restart)


class Recovering(Reporter):
    """Passes everything to `reporter`, and tells when the run has regained its last step."""

    def __init__(
        self, reporter: Reporter, lost: Interrupted, first_step: int, num_workers: int
    ) -> None:
        self._reporter, self._lost = reporter, lost
        self._first_step, self._is_regained = first_step, False
        self._repeated_seconds = 0.0
        why = f"restart {lost.restart}, after a failure" if lost.restart else "workers came or left"
        self.change(
            ChangeRecord(
                step=first_step,
                change=f"going on with {num_workers} worker(s) after step {first_step}",
                reason=f"{why}; the last step was {lost.last_step}",
            )
        )

    def step(self, record: StepRecord) -> None:
        self._reporter.step(record)
        repeats = record.step <= self._lost.last_step
        self._repeated_seconds += record.seconds if repeats else 0
        if not self._is_regained and record.step >= self._lost.last_step:
            self._is_regained = True
            lost, repeated = time.time() - self._lost.when, self._lost.last_step - self._first_step
            self.say(
                f"the interruption took {lost:.1f} s, with {max(repeated, 0)} steps repeated in "
                f"{self._repeated_seconds:.1f} s"
            )

    def validation(self, record: ValidationRecord) -> None:
        self._reporter.validation(record)

    def change(self, record: ChangeRecord) -> None:
        self._reporter.change(record)

    def say(self, text: object) -> None:
        self._reporter.say(text)

    def close(self) -> None:
        self._reporter.close()
