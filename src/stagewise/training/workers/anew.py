"""Workers started in the place of lost ones: how they and the others go on together.

A worker that loses a peer leaves its run's body by `StartedAnew`, and all meet. Then each begins
the body again, as if resumed from a checkpoint, but with its state from memory (`kept_states`),
where the new one finds that of the lost one. If another is lost while they do so, they begin anew.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from stagewise.errors import PeerError, StagewiseError
from stagewise.training.workers.elastic import Interrupted
from stagewise.training.workers.kept_states import KeptStates
from stagewise.training.workers.lost import REPLACES, LostWorkers
from stagewise.training.workers.survivors import Survivors, losses_in_words
from stagewise.training.workers.worker import joined


class StartedAnew(Exception):
    """A rank was lost, whose state is kept, and another is started in its place.

    `error` is what the loss has led to here, `until` this rank's last step and when it was applied
    (seconds since the epoch); the new one's are None.
    """

    def __init__(
        self,
        survivors: Survivors,
        error: StagewiseError | None = None,
        until: tuple[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.survivors, self.error, self.until = survivors, error, until
        self.dead = dict[int, str]()  # that have been met without


@dataclass(frozen=True, kw_only=True)
class Regained:
    """What a run goes on from after a loss: what this rank, or the lost one, had kept."""

    kept: Any
    interrupted: Interrupted

    latest: ClassVar["Regained | None"] = None


def run_joined(timeout: float | None, body: Callable[[], None]) -> None:
    """Join the other workers and run `body`; again whenever one was started anew."""
    anew = _in_its_place(timeout or 0.0) if REPLACES in os.environ else None
    with joined(timeout, forms=anew is None):
        while (anew := _lost_in(body, anew)) is not None:
            pass


def _in_its_place(timeout: float) -> StartedAnew:
    lost = LostWorkers.here()
    assert lost is not None
    return StartedAnew(Survivors(lost, timeout, lost.replacements))


def _lost_in(body: Callable[[], None], anew: StartedAnew | None) -> StartedAnew | None:
    """Run `body`, if `anew` with all who meet; return what else was lost meanwhile."""
    try:
        if anew is not None:
            anew.dead |= anew.survivors.meet(anew.error)
            if anew.error is not None:  # which keeps the old stages
                anew.error.__cause__ = anew.error.__context__ = anew.error.__traceback__ = None
            _regain(anew)
        body()
    except StartedAnew as lost:
        return lost.with_traceback(None)
    except PeerError as error:
        if anew is None or not anew.survivors.newly_lost(error):
            raise
        anew.error = error
        return anew
    return None


def _regain(anew: StartedAnew) -> None:
    """Agree with all on the step to go on from; collective."""
    kept, told = KeptStates.here().regained((anew.until, anew.dead))
    dead = {rank: how for _, each in told for rank, how in each.items()}
    ends = [until for until, _ in told if until is not None]
    last_step, when = max(ends, default=(kept[1].step, time.time()))
    Regained.latest = Regained(
        kept=kept,
        interrupted=Interrupted(
            last_step=last_step,
            when=when,
            restart=0,
            why=f"{losses_in_words(dead)}, and started anew with the state that it had kept",
        ),
    )
