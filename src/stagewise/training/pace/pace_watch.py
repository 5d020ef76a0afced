"""Name a device that has become slow: one whose instructions take longer than in its first steps,
while those of the others do not. All ranks see the same timelines, and say the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from stagewise.planning.drift import NUM_LOOKS
from stagewise.planning.plan import Plan
from stagewise.schedule import Kind
from stagewise.timeline import Timeline
from stagewise.training.metrics.progress import ChangeRecord

SLOW = 1.5  # times its own first steps, and the others' growth
GROSS = 3.0  # so much in every instruction of one step is told at once
_CONFIRMED = 2  # looks in a row, before a plan is made for a slow device

Place = tuple[int, int]  # device, stage
Look = tuple[int, Mapping[Place, float]]  # a step, and each place's seconds for a microbatch


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
        self._looks: list[Look] = []
        self._slow: set[Place] = set()

    def carry_over(self, old: Plan, new: Plan) -> None:
        """Watch `new`, what was usual of `old` being usual, and who was slow there being slow.

        The plans' costs must be those of the same steps.
        """
        before, now = (_seconds(replace(plan, speeds=()).timeline) for plan in (old, new))
        usual, slow = _usual(self._looks[:NUM_LOOKS]), {device for device, _ in self._slow}
        ratios: dict[int, list[float]] = {device: [] for device, _ in now}
        for place in before.keys() & usual.keys():
            ratios[place[0]].append(usual[place] / before[place])
        seconds = {place: planned * median(ratios[place[0]]) for place, planned in now.items()}
        self._looks = [(self._looks[-1][0], seconds)] * NUM_LOOKS
        self._slow = {place for place in now if place[0] in slow}

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

    def slowed(self, known: Mapping[int, float]) -> dict[int, float]:
        """Return how many times as long as usual each slow device takes, compared with the others.

        Those that are not `known` must have been slow at the last looks too; those that are, SLOW
        times slower or faster than known, or else what is known is returned.
        """
        first, found = self._looks[:NUM_LOOKS], dict[int, list[list[float]]]()
        for place in sorted(self._slow):
            paces = list(_paces(place, self._looks[-_CONFIRMED:], first))
            if paces and (place[0] in known or all(pace.is_slow for pace in paces)):
                times = [pace.factor / pace.others for pace in paces]
                found.setdefault(place[0], []).append(times)
        return {
            device: _agreed(
                known.get(device), [max(1.0, median(t)) for t in zip(*of, strict=False)]
            )
            for device, of in found.items()
        }

    def name_of(self, device: int) -> str:
        """Return the rank and its host, or the device's number."""
        known = len(self._places) > device and self._places[device]
        return self._places[device] if known else f"device {device}"

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
        who = self.name_of(pace.device)
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


def _agreed(known: float | None, times: Sequence[float]) -> float:
    """Return the last of `times`; what is `known` unless all are SLOW times more, or less but slow.

    A device that is slow no longer is to be told as such first.
    """
    if known is None or min(times) > SLOW * known or SLOW < min(times) <= max(times) < known / SLOW:
        return times[-1]
    return known


def _usual(first: Sequence[Look]) -> dict[Place, float]:
    return {p: median(seconds[p] for _, seconds in first if p in seconds) for p in first[0][1]}


def _paces(place: Place, recent: Sequence[Look], first: Sequence[Look]) -> Iterator[Pace]:
    """Yield how `place` does in `recent` steps, compared with the `first` ones."""
    usual = _usual(first)
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
