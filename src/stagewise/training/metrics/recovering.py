"""The reporter of a rank; of a run that was interrupted, it also tells what that has cost."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from stagewise.engine.transport.processes import is_first, num_processes
from stagewise.training.metrics.heard import Hear, Heard
from stagewise.training.metrics.progress import (
    ChangeRecord,
    Reporter,
    Shown,
    Silent,
    StepRecord,
    ValidationRecord,
)
from stagewise.training.workers.elastic import Interrupted


def reporter_here(
    console: Console,
    run: Path,
    hear: Hear,
    line_every: int,
    steps: tuple[int, int],
    interrupted: Interrupted | None = None,
    loggers: Sequence[str] = (),
) -> Heard:
    """Return this rank's reporter, which `hear` hears; `steps` are the number done and of all."""
    if not is_first():
        return Heard(Silent(), hear)
    done, every = steps
    shown = Shown(
        console=console,
        run=run,
        first_step=done,
        num_steps=every,
        line_every=line_every,
        loggers=loggers,
    )
    told = Recovering(shown, interrupted, done, num_processes()) if interrupted else shown
    return Heard(told, hear)


class Recovering(Reporter):
    """Passes everything to `reporter`, and tells when the run has regained its last step."""

    def __init__(
        self, reporter: Reporter, lost: Interrupted, first_step: int, num_workers: int
    ) -> None:
        self._reporter, self._lost = reporter, lost
        self._first_step, self._is_regained = first_step, False
        self._repeated_seconds = 0.0
        restart = f"restart {lost.restart}, after a failure" if lost.restart else ""
        why = lost.why or restart or "the workers were started again"
        self.change(
            ChangeRecord(
                step=first_step,
                change=f"going on with {num_workers} worker(s) after step {first_step}",
                reason=f"{why}; the last step was {lost.last_step}",
                kind="loss_of_ranks" if lost.why else "change",
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
