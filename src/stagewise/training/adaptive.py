"""Change the plan during a run when costs drift from those that it was made from.

Also name a device that has become slow: one whose instructions take longer than in its first steps,
while those of the others do not.
All ranks see the same timelines and costs, so each reaches the same decision independently.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import TypeVar

import torch

from stagewise.costs import CellCost
from stagewise.errors import OutOfMemoryError, PlanError
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.drift import NUM_LOOKS, Change, Drift, drift_of, faster_plan
from stagewise.planning.plan import Plan
from stagewise.planning.search.less_memory import with_less_memory
from stagewise.planning.search.stage_blocks import in_blocks
from stagewise.schedule import Kind
from stagewise.timeline import Timeline
from stagewise.training.metrics.progress import ChangeRecord

MAX_ATTEMPTS = 8  # at a step that runs out of memory, each with a plan that needs less
T = TypeVar("T")
SLOW = 1.5  # times its own first steps, and the others' growth
GROSS = 3.0  # so much in every instruction of one step is told at once
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
            return "the plan stays, because no other is predicted to be sufficiently faster"
        old, new = self.drift.plan, self.change.plan
        parts = [
            f"{what} {now} instead of {before}"
            for what, now, before in (
                ("microbatches", new.num_microbatches, old.num_microbatches),
                ("schedule", new.schedule, old.schedule),
                ("cells per stage", list(new.balance), list(old.balance)),
            )
            if now != before
        ]
        return ", ".join(parts)


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


Place = tuple[int, int]  # device, stage


@dataclass(frozen=True, kw_only=True)
class Pace:
    """That a device has become slow, or is no longer (`factor` is that of a usual one)."""

    device: int
    stage: int
    factor: float  # its seconds over those of its first steps
    others: float  # the same of the other devices, their median
    since: int  # the first step that shows it

    @property
    def is_slow(self) -> bool:
        return self.factor > SLOW * self.others

    def __str__(self) -> str:
        return (
            f"since step {self.since} stage {self.stage} takes {self.factor:.1f} times as long "
            f"there as in its first steps, the other devices {self.others:.1f} times"
        )


class PaceWatch:
    """Watches the measured timelines of one plan, which all ranks have.

    `places` name the devices; without one for each they are numbered.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self._places = places
        self.forget()

    def forget(self) -> None:
        """Watch a new plan from here on."""
        self._looks: list[tuple[int, dict[Place, float]]] = []  # step, seconds
        self._slow: set[Place] = set()

    def look(self, step: int, timeline: Timeline) -> list[ChangeRecord]:
        """Record step `step`; tell the devices that have become slow, or no longer are.

        The last NUM_LOOKS steps must all show it, or every instruction of this one must be GROSS.
        """
        if told := self._grossly_slow(step, timeline):  # these steps are not the usual ones
            self._looks[:NUM_LOOKS] = (self._looks * NUM_LOOKS)[:NUM_LOOKS]
        self._looks.append((step, _seconds(timeline)))
        recent, earlier = self._looks[-NUM_LOOKS:], self._looks[:-NUM_LOOKS]
        del self._looks[NUM_LOOKS:-NUM_LOOKS]
        for place in sorted(recent[-1][1]) if earlier else ():
            paces = list(_paces(place, recent, earlier[:NUM_LOOKS]))
            slow = {pace.is_slow for pace in paces}
            if len(paces) == NUM_LOOKS and len(slow) == 1 and slow != {place in self._slow}:
                self._slow ^= {place}
                told.append(self._told(step, replace(paces[-1], since=paces[0].since)))
        return told

    def _grossly_slow(self, step: int, timeline: Timeline) -> list[ChangeRecord]:
        first, told = self._looks[:NUM_LOOKS], []
        now = [(step, _seconds(timeline, min))] if first else []
        for place in sorted(now[0][1].keys() - self._slow) if now else ():
            for pace in _paces(place, now, first):
                if pace.factor > GROSS * max(pace.others, 1.0):
                    self._slow.add(place)
                    told.append(self._told(step, pace))
        return told

    def _told(self, step: int, pace: Pace) -> ChangeRecord:
        is_rank = len(self._places) > pace.device and self._places[pace.device]
        who = self._places[pace.device] if is_rank else f"device {pace.device}"
        what = "has become slow" if pace.is_slow else "is no longer slow"
        return ChangeRecord(step=step, change=f"{who} {what}", reason=str(pace), kind="pace")


def slowest_stage(timeline: Timeline) -> tuple[int, float] | None:
    """Return the stage whose microbatches take longest, and its seconds over the others' mean."""
    by_stage: dict[int, list[float]] = {}
    for (_, stage), seconds in _seconds(timeline).items():
        by_stage.setdefault(stage, []).append(seconds)
    means = {stage: fmean(seconds) for stage, seconds in by_stage.items()}
    if len(means) < 2:
        return None
    stage = max(means, key=means.__getitem__)
    others = fmean(seconds for other, seconds in means.items() if other != stage)
    return (stage, means[stage] / others) if others else None


def _paces(
    place: Place,
    recent: Sequence[tuple[int, Mapping[Place, float]]],
    first: Sequence[tuple[int, Mapping[Place, float]]],
) -> Iterator[Pace]:
    """Yield how `place` does in `recent` steps, compared with the `first` ones."""
    usual = {p: median(s[p] for _, s in first if p in s) for p in first[0][1]}
    for step, seconds in recent:
        grown = {p: now / usual[p] for p, now in seconds.items() if usual.get(p)}
        others = [factor for p, factor in grown.items() if p[0] != place[0]]
        if place in grown and others:
            device, stage = place
            yield Pace(
                device=device, stage=stage, factor=grown[place], others=median(others), since=step
            )


def _seconds(timeline: Timeline, of: Callable[[list[float]], float] = median) -> dict[Place, float]:
    """Return each device's seconds for one microbatch of each of its stages, `of` them all."""
    times: dict[tuple[Place, Kind], list[float]] = {}
    for span in timeline.spans:
        place = span.device, span.instruction.stage
        times.setdefault((place, span.instruction.kind), []).append(span.seconds)
    sums: dict[Place, float] = {}
    for (place, _), seconds in times.items():
        sums[place] = sums.get(place, 0.0) + of(seconds)
    return sums
