"""The contest: plans that are run in turn, costs corrected by what they show, and a second round.

Problem: predictions are wrong by more than good plans differ, and trying plans takes time.
Idea: the fastest predicted plans of different kinds run first; what all of them show corrects the
costs; what the next search finds runs beside the fastest so far. Each takes turns of a step to warm
up and one that counts, as many as there is time for; where there is little, fewer plans are tried.
A step or two are no certainty either: the corrected prediction counts as one step more.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from stagewise.costs import CellCost, LinkCost
from stagewise.engine.transport.connect import values_of_all
from stagewise.pipeline.trials import (
    Measured,
    NoMemoryError,
    Running,
    corrected_costs,
    machine_here,
    try_plans,
)
from stagewise.planning.calibrate import EngineOverhead, with_engine_overhead
from stagewise.planning.search.bounds import least_plan_seconds
from stagewise.planning.search.evaluate import EvaluatedPlan
from stagewise.planning.search.finalists import FINALISTS, Tried, is_among, repriced
from stagewise.planning.search.search import SYNTHESIS_EFFORT, CostsAt, Progress, SearchResult
from stagewise.profiling.example import Example

LEAST_SECONDS, MOST_STEPS = 2.0, 10  # of everything, the search included
FIRST_EFFORT = 100_000  # of syntheses before anything was tried
_SHARE_OF_FIRST, _SHARE_OF_SEARCH = 0.7, 0.25  # of the time left
_SHORT_SECONDS = 0.05  # of a step: there is always time for a few
_CLOSE = 1.05  # times the fastest: worth further steps
_WORTH = 0.99  # times the fastest: predicted to take longer, a plan is not tried afterwards


class TimeLeft:
    """The time for everything, and what is left of it: rank 0 decides, and tells the others."""

    def __init__(self, start: float, seconds: float | None, searching: float) -> None:
        self._start, self._seconds, self._searching = start, seconds, searching

    def left(self, step_seconds: float) -> float:
        """Return the seconds left if a step takes so many; collective."""
        limit = max(LEAST_SECONDS, MOST_STEPS * step_seconds)
        ends = self._start + (limit if self._seconds is None else self._seconds)
        return max(0.0, values_of_all(ends - time.perf_counter(), "plan: the time left")[0])

    def effort(self, left: float) -> int:
        """Return how much a search may examine by what the first one took; at least as much."""
        most = _SHARE_OF_SEARCH * left / max(self._searching, 1e-3)
        return int(min(SYNTHESIS_EFFORT, FIRST_EFFORT * max(1.0, most)))


def _number(left: float, step_seconds: float, others: int, least: int) -> int:
    """Return how many plans there is time to try, two steps each, beside `others` steps."""
    if step_seconds < _SHORT_SECONDS:
        return FINALISTS
    return max(least, min(FINALISTS, int((left / step_seconds - others) // 2)))


class Contest:
    """The plans tried so far, and what they showed."""

    def __init__(
        self,
        example: Example,
        counts: Sequence[int],
        costs_at: CostsAt,
        link: LinkCost,
        clock: TimeLeft,
        progress: Progress | None,
    ) -> None:
        self.example, self.counts, self.costs_at, self.link = example, counts, costs_at, link
        self._clock, self._progress = clock, progress
        self._warm: dict[str, Running] = {}
        self.plans: dict[str, EvaluatedPlan] = {}  # as predicted
        self.measured: dict[str, Measured] = {}

    def decide(
        self, found: SearchResult, best: Callable[[LinkCost, EngineOverhead, int], SearchResult]
    ) -> SearchResult:
        """Return the result of the search that trials correct, with the fastest plan measured."""
        step = found.chosen.seconds
        left = self._clock.left(step)
        number = _number((1 - _SHARE_OF_SEARCH) * left, step, others=4, least=2)
        self._run_first(found.finalists, number, _SHARE_OF_FIRST * left)
        link, engine = self._known()
        fastest, *others = self._ranked(link, engine)
        step, so_far = self.measured[fastest].seconds, self.plans[fastest]
        found = best(link, engine, self._clock.effort(self._clock.left(step)))
        least = self._repriced(so_far, link, engine).seconds
        fresh = [
            plan
            for plan in found.finalists
            if plan.seconds < _WORTH * least and not is_among(plan, self.plans.values())
        ]
        left = self._clock.left(step)
        close = [w for w in others if self.measured[w].seconds < _CLOSE * step]
        if fresh or (close and left > 4 * step):
            again = [self.plans[words] for words in close]
            number = _number(left, step, others=2, least=1)
            self._run([so_far, *[*fresh, *again][: min(number, FINALISTS - 1)]], left)
        return self._result(found)

    def _run_first(self, plans: Sequence[EvaluatedPlan], number: int, seconds: float) -> None:
        """Try the first `number` plans; if memory is not enough for any, those that follow."""
        try:
            self._run(plans[:number], seconds)
        except NoMemoryError:
            if not plans[number:]:
                raise
            self._run_first(plans[number:], number, seconds)

    def _run(self, plans: Sequence[EvaluatedPlan], seconds: float) -> None:
        """Try `plans` in this time."""
        named: dict[str, EvaluatedPlan] = {}
        for plan in plans:
            words = next((w for w, other in self.plans.items() if other is plan), str(plan))
            while words in named or (words in self.plans and self.plans[words] is not plan):
                words += " (another cut)"
            named[words] = plan
        self.plans |= named
        found = try_plans(
            {words: plan.plan() for words, plan in named.items()},
            self.example,
            seconds=seconds,
            tell=self._tell,
            warm=self._warm,
        )
        for words in found.keys() & self.measured.keys():  # costs follow from all steps
            found[words].timelines.extend(self.measured[words].timelines)
        self.measured |= found
        self._latest = [words for words in named if words in self.measured]

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(1, 1, what)

    def _ranked(self, link: LinkCost, engine: EngineOverhead) -> list[str]:
        """Return those that ran in turn last, the fastest first."""

        def seconds(words: str) -> float:
            predicted = self._repriced(self.plans[words], link, engine).seconds
            return statistics.fmean([*self.measured[words].step_seconds, predicted])

        return sorted(self._latest, key=seconds)

    def _cells(self, count: int, engine: EngineOverhead) -> tuple[CellCost, ...]:
        return with_engine_overhead(self.costs_at(count), engine)

    def _known(self) -> tuple[LinkCost, EngineOverhead]:
        """Return what messages and instructions cost, as all steps so far show it."""
        measured = [*self.measured.values()]
        return corrected_costs(self.link, self.costs_at, measured, self.example.where)

    def _repriced(
        self, plan: EvaluatedPlan, link: LinkCost, engine: EngineOverhead
    ) -> EvaluatedPlan:
        return repriced(plan, self._cells(plan.num_microbatches, engine), link)

    def _result(self, found: SearchResult) -> SearchResult:
        link, engine = self._known()
        fastest, *_ = self._ranked(link, engine)
        priced = {words: self._repriced(self.plans[words], link, engine) for words in self.measured}
        chosen = priced[fastest]
        order = sorted(self.measured, key=lambda w: (w != fastest, self.measured[w].seconds))
        others = [
            plan for plan in (found.chosen, *found.runners_up) if not is_among(plan, [chosen])
        ]
        return replace(
            found,
            chosen=chosen,
            runners_up=tuple(others),
            bound_seconds=min(
                least_plan_seconds(
                    self._cells(count, engine),
                    len(chosen.device_bytes),
                    count,
                    replicas=chosen.option.replicated,
                )
                for count in self.counts
            ),
            tried=tuple(
                Tried(
                    what=words,
                    predicted_seconds=self.plans[words].seconds,
                    measured_seconds=self.measured[words].seconds,
                    corrected_seconds=priced[words].seconds,
                    num_steps=len(self.measured[words].step_seconds),
                )
                for words in order
            ),
            machine=machine_here(self.example.where),
        )
