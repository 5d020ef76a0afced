"""Change the plan during a run when costs drift from those that it was made from.

All ranks see the same timelines and costs, so each reaches the same decision independently.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from stagewise.costs import CellCost
from stagewise.errors import OutOfMemoryError, PlanError
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.drift import NUM_LOOKS, Change, Drift, drift_of, faster_plan
from stagewise.planning.plan import Plan
from stagewise.planning.search.less_memory import with_less_memory
from stagewise.planning.search.stage_blocks import in_blocks
from stagewise.timeline import Timeline
from stagewise.training.metrics.progress import ChangeRecord

MAX_ATTEMPTS = 8  # at a step that runs out of memory, each with a plan that needs less
T = TypeVar("T")
STAYS = "the plan stays: no other is predicted to be sufficiently faster"
MAX_CHANGES = 8  # per run; if a machine changes all the time, re-planning does not help


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What drifted, and the plan to change to; `change` is None if none is worth it."""

    drift: Drift
    change: Change | None

    @property
    def moves(self) -> bool:
        """Whether cells move to other devices."""
        return self.change is not None and self.change.moves

    @property
    def plan(self) -> Plan:
        """What to go on with."""
        return self.drift.plan if self.change is None else self.change.plan

    def record(self, step: int) -> ChangeRecord:
        """Return what is shown and logged of it."""
        gain = None if self.change is None else self.change.gain
        return ChangeRecord(
            step=step, change=self.words, reason=str(self.drift), predicted_gain=gain
        )

    @property
    def words(self) -> str:
        """The change in words."""
        if self.change is None:
            return STAYS
        return change_in_words(self.drift.plan, self.change.plan)


def change_in_words(old: Plan, new: Plan) -> str:
    """Say in what they differ."""
    parts = [
        f"{what} {now} instead of {before}"
        for what, now, before in (
            ("microbatches", new.num_microbatches, old.num_microbatches),
            ("schedule", new.schedule, old.schedule),
            ("recomputation", new.recompute, old.recompute),
            ("cells per stage", list(new.balance), list(old.balance)),
        )
        if now != before
    ]
    return ", ".join(parts) or "instructions in another order"


def use(pipe: Pipeline, plan: Plan) -> None:
    """Use `plan`, with whole stages if its segments would share a buffer."""
    try:
        pipe.use(plan)
    except PlanError:
        if not plan.segments:
            raise
        pipe.use(replace(plan, segments=()))


def within_memory(
    pipe: Pipeline, step: Callable[[], T], use_less: Callable[[OutOfMemoryError], None] | None
) -> T:
    """Return what `step` does; if it runs out of memory, call `use_less` (if given) and repeat it.

    A failed step leaves no trace, so the result is as if the run had always used that plan.
    """
    first = pipe.step_index
    for attempt in itertools.count(1):
        pipe.step_index = first
        try:
            return step()
        except OutOfMemoryError as error:
            if use_less is None or attempt == MAX_ATTEMPTS:
                raise
            failed = OutOfMemoryError(str(error))
        # Outside the handler, so that the tensors that the error refers to are freed.
        use_less(failed)
    raise AssertionError("count() does not end")


def use_less_memory(pipe: Pipeline, num_samples: int, error: str) -> str:
    """Change to a plan that needs less memory, and return the change in words."""
    found = with_less_memory(pipe.plan, num_samples)
    if found is None:
        raise OutOfMemoryError(
            f"{error}\nThis was already with {pipe.num_microbatches} microbatches and "
            f"recompute={pipe.plan.recompute!r}; use more stages, or a smaller batch or model"
        )
    plan, change = found
    use(pipe, plan)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # frees blocks of the old sizes
    return change


class DriftWatch:
    """Watches measured timelines; `measured` are the cells' costs by number of microbatches."""

    def __init__(self, measured: Mapping[int, Sequence[CellCost]]) -> None:
        self._measured = dict(measured)
        self._looks: list[Timeline] = []
        self._num_changes = 0
        self.least_microbatches = 1

    def ran_out_of_memory(self, num_microbatches: int) -> None:
        """Require more microbatches of future plans, and forget timelines of the old plan."""
        self.least_microbatches = num_microbatches + 1
        self._looks.clear()

    def look(self, plan: Plan, timeline: Timeline) -> Decision | None:
        """Record a step of `plan`; return a decision if costs have drifted.

        The caller then continues with the plan of the change, or else of the drift.
        """
        if not plan.cells or self._num_changes >= MAX_CHANGES:
            return None
        self._looks = [*self._looks[1 - NUM_LOOKS :], timeline]
        drift = drift_of(plan, self._looks)
        if drift is None:
            return None
        self._looks.clear()
        self._num_changes += 1
        self._measured = {count: drift.scaled(cells) for count, cells in self._measured.items()}
        change = faster_plan(
            drift.plan,
            self._measured,
            may_move=True,
            least_microbatches=self.least_microbatches,
        )
        if change is not None and plan.segments:
            change = replace(change, plan=in_blocks(change.plan))
        return Decision(drift=drift, change=change)
