"""Workers started in the place of lost ones: how they and the others go on together.

A worker that loses a peer leaves its run's body by `StartedAnew`, and all meet. Then each begins
the body again, as if resumed from a checkpoint, but with its state from memory (`kept_states`),
where the new one finds that of the lost one.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from stagewise.errors import StagewiseError
from stagewise.training.workers.elastic import Interrupted
from stagewise.training.workers.kept_states import KeptStates
from stagewise.training.workers.lost import REPLACES, LostWorkers
from stagewise.training.workers.survivors import Survivors
from stagewise.training.workers.worker import joined


class StartedAnew(Exception):
    """A rank was lost, whose state is kept, and another is started in its place."""

    def __init__(self, survivors: Survivors, error: StagewiseError, until: Interrupted) -> None:
        super().__init__(until.why)
        self.survivors, self.error, self.until = survivors, error, until


@dataclass(frozen=True, kw_only=True)
class Regained:
    """What a run goes on from after a loss: what this rank, or the lost one, had kept."""

    kept: Any
    interrupted: Interrupted

    latest: ClassVar["Regained | None"] = None


def run_joined(timeout: float | None, body: Callable[[], None]) -> None:
    """Join the other workers and run `body`; again whenever one was started anew."""
    is_new = REPLACES in os.environ
    with joined(timeout, partial(_meet, timeout or 0.0) if is_new else None):
        if is_new:
            _regain(None)
        while (lost := _lost_in(body)) is not None:
            lost.survivors.meet(lost.error)
            lost.error.__cause__ = lost.error.__context__ = lost.error.__traceback__ = None
            _regain(lost.until)


def _lost_in(body: Callable[[], None]) -> StartedAnew | None:
    try:
        body()
    except StartedAnew as lost:
        return lost.with_traceback(None)
    return None


def _meet(timeout: float) -> None:
    lost = LostWorkers.here()
    assert lost is not None
    Survivors(lost, timeout, lost.replacements).meet()


def _regain(until: Interrupted | None) -> None:
    """Agree with all on the step to go on from; collective."""
    kept, told = KeptStates.here().regained(until)
    ends = [each for each in told if each is not None]
    last = max(ends, key=lambda each: each.last_step)
    Regained.latest = Regained(kept=kept, interrupted=last)
