"""Measure, search, try the best plans, correct the costs, and search again.

Problem: fine plans with many stages look best while messages and instructions are thought to be
cheap, and no prediction is as good as a step on the devices themselves.
Idea: the fastest predicted plans of different kinds are run; what they show corrects the costs; if
the next search finds something that should be faster, it is run beside the fastest so far. The
whole takes at most the time of a few steps.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from stagewise.costs import CellCost, LinkCost
from stagewise.engine.transport.connect import values_of_all
from stagewise.engine.transport.processes import is_first, num_processes
from stagewise.errors import PlanError
from stagewise.free_pages import HEAP
from stagewise.model.cell import Chain
from stagewise.pipeline.device_speeds import on_fastest, with_speeds
from stagewise.pipeline.trials import (
    Measured,
    corrected_costs,
    devices_are_real,
    machine_here,
    try_plans,
)
from stagewise.planning.calibrate import FREE_ENGINE, EngineOverhead, with_engine_overhead
from stagewise.planning.interpolate import interpolated
from stagewise.planning.request import PlanRequest
from stagewise.planning.reserve import reserve_of
from stagewise.planning.search.bounds import least_plan_seconds
from stagewise.planning.search.evaluate import EvaluatedPlan
from stagewise.planning.search.finalists import FINALISTS, Tried, is_among, repriced
from stagewise.planning.search.search import CostsAt, Progress, SearchResult, search_for
from stagewise.profiling.example import Example, agreed_costs

MEASURING_CELLS = 3.0  # seconds, unless plans are tried
LEAST_SECONDS, MOST_STEPS = 2.0, 10  # of everything, the search included
_SHARE_OF_CELLS, _SHARE_OF_FIRST = 0.3, 0.7
_LEAST_STEPS = 2  # of each plan that is tried: what one shows may be an interruption's
_WORTH = 0.99  # times the fastest: predicted to take longer, a plan is not tried afterwards


def agreed_request(request: PlanRequest, chain: Chain) -> PlanRequest:
    """Raise PlanError on every rank unless all request the same plan of the same model; collective.

    Return the request with the memory of every rank's device, if they differ. A schedule that is
    no name is compared in its plan.
    """
    given = dict(vars(request))
    if not isinstance(request.schedule, str):
        given["schedule"] = None
    given["model"] = [[tuple(p.shape) for p in cell.module.parameters()] for cell in chain]
    rows = values_of_all(given, "plan")
    caps = [row.pop("memory_bytes") for row in rows]
    for row, cap in zip(rows, caps, strict=True):
        row["memory_bytes"] = cap if cap is None or isinstance(cap, Sequence) else "its own"
    for name in given:
        differing = [rank for rank, row in enumerate(rows) if row[name] != rows[0][name]]
        if differing:
            raise PlanError(
                f"ranks {differing} called plan with a different {name} than rank 0; call it with "
                "the same arguments on every rank"
            )
    if request.memory_bytes is None or len(set(caps)) == 1:
        return request
    each = request.num_devices in (None, len(caps))
    return replace(request, memory_bytes=caps if each else min(caps))


def search_plan(
    request: PlanRequest,
    example: Example,
    *,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Search for the fastest plan by costs measured on `example`, and by trial; collective.

    The request's `num_devices` defaults to the number of ranks. `seconds` bounds the whole if plans
    are tried, by default to MOST_STEPS steps, at least LEAST_SECONDS.
    """
    start = time.perf_counter()
    request = agreed_request(request, example.chain)
    if request.num_devices is None:
        if num_processes() == 1:
            raise PlanError("the search needs the number of devices; give num_devices")
        request = replace(request, num_devices=num_processes())
    assert request.num_devices is not None
    counts = request.counts(example.num_samples, example.parts)
    sizes = [example.size_of(count) for count in counts]
    cells = MEASURING_CELLS if seconds is None else seconds
    request = with_speeds(request, example, min(sizes), seconds=cells / 4)
    assert request.num_devices is not None
    tries = devices_are_real(request, request.num_devices)
    if tries:
        cells = _SHARE_OF_CELLS * (LEAST_SECONDS if seconds is None else seconds)
    costs_at, link = _costs(request, example, counts, cells, least=1 if tries else None)

    def best(link: LinkCost, engine: EngineOverhead) -> SearchResult:
        return _by_first(
            lambda: search_for(
                request,
                lambda count: with_engine_overhead(costs_at(count), engine),
                counts,
                link=link,
                reserve=reserve_of(example.where.type, posts=num_processes() > 1),
                progress=progress,
            )
        )

    found = best(link, FREE_ENGINE)
    if tries:
        limit = max(LEAST_SECONDS, MOST_STEPS * found.chosen.seconds)
        ends = start + (limit if seconds is None else seconds)
        least = _LEAST_STEPS if seconds is None else 1
        contest = _Contest(example, counts, costs_at, link, ends, least, progress)
        found = contest.decide(found, best)
    HEAP.give_back()
    return found


def _by_first(search: Callable[[], SearchResult]) -> SearchResult:
    """Return on every rank what rank 0 finds, since ranks of one host share its cores."""
    found: SearchResult | PlanError | None = None
    if is_first():
        try:
            found = search()
        except PlanError as error:
            found = error
    found = values_of_all(found, "plan: the search")[0]
    if isinstance(found, PlanError):
        raise found
    assert found is not None
    return found


class _Contest:
    """The plans tried so far, and what they showed."""

    def __init__(
        self,
        example: Example,
        counts: Sequence[int],
        costs_at: CostsAt,
        link: LinkCost,
        ends: float,
        least: int,  # steps of each
        progress: Progress | None,
    ) -> None:
        self.example, self.counts, self.costs_at, self.link = example, counts, costs_at, link
        self._ends, self._least, self._progress = ends, least, progress
        self.plans: dict[str, EvaluatedPlan] = {}  # as predicted
        self.measured: dict[str, Measured] = {}

    def decide(
        self, found: SearchResult, best: Callable[[LinkCost, EngineOverhead], SearchResult]
    ) -> SearchResult:
        """Return the result of the search that trials correct, with the fastest plan measured."""
        self._run(found.finalists, _SHARE_OF_FIRST)
        found = best(*self._known([*self.measured.values()]))
        fastest = self._fastest()
        fresh = [
            plan
            for plan in found.finalists
            if plan.seconds < _WORTH * self.measured[fastest].seconds
            and not is_among(plan, self.plans.values())
        ]
        if fresh:
            self._run([self.plans[fastest], *fresh[: FINALISTS - 1]], 1.0)
        return self._result(found, self._fastest())

    def _run(self, plans: Sequence[EvaluatedPlan], share: float) -> None:
        """Try `plans` in this share of the time that is left."""
        named: dict[str, EvaluatedPlan] = {}
        for plan in plans:
            words = next((w for w, other in self.plans.items() if other is plan), str(plan))
            while words in named or (words in self.plans and self.plans[words] is not plan):
                words += " (another cut)"
            named[words] = plan
        self.plans |= named
        left = max(0.0, self._ends - time.perf_counter())
        self.measured |= try_plans(
            {words: plan.plan() for words, plan in named.items()},
            self.example,
            seconds=share * left,
            least=self._least,
            tell=self._tell,
        )
        self._latest = [words for words in named if words in self.measured]

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(1, 1, what)

    def _fastest(self) -> str:
        """Return the fastest of those that ran in turn last."""
        return min(self._latest, key=lambda words: self.measured[words].seconds)

    def _known(self, measured: Sequence[Measured]) -> tuple[LinkCost, EngineOverhead]:
        return corrected_costs(self.link, self.costs_at, measured, self.example.where)

    def _result(self, found: SearchResult, fastest: str) -> SearchResult:
        priced = {
            words: self._corrected(self.plans[words], measured)
            for words, measured in self.measured.items()
        }
        chosen = priced[fastest]
        engine = self._known([self.measured[fastest]])[1]
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
                    with_engine_overhead(self.costs_at(count), engine),
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

    def _corrected(self, plan: EvaluatedPlan, measured: Measured) -> EvaluatedPlan:
        """Return `plan` at the costs that its own steps showed."""
        link, engine = self._known([measured])
        cells = with_engine_overhead(self.costs_at(plan.num_microbatches), engine)
        return repriced(plan, cells, link)


def _costs(
    request: PlanRequest,
    example: Example,
    counts: Sequence[int],
    seconds: float,
    *,
    least: int | None,
) -> tuple[CostsAt, LinkCost]:
    """Return the cells' costs for each number of microbatches, the same on every rank."""
    sizes = {count: example.size_of(count) for count in counts}
    small, large = min(sizes.values()), max(sizes.values())
    measured: dict[int, tuple[CellCost, ...]] = {}
    for size in sorted({small, large}):
        part = seconds / len({small, large}) if least else seconds
        own = example.measured(size, seconds=part, split=True, least=least)
        measured[size], link = agreed_costs(on_fastest(request, own), example.where)
    at = interpolated(measured[small], small, measured[large], large)
    return (lambda count: at(sizes[count])), link
