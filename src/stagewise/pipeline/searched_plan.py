"""Measure, search, try the best plans, correct the costs, and search again.

Problem: fine plans with many stages look best while messages and instructions are thought to be
cheap, and no prediction is as good as a step on the devices themselves.
Idea: the fastest predicted plans of different kinds are run; what they show corrects the costs; if
the next search finds something that should be faster, it is run beside the fastest so far. The
whole takes about the time of ten steps: fewer plans are tried, and less is synthesised, where
measuring and searching have left less of it.
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
from stagewise.pipeline.contest import FIRST_EFFORT, LEAST_SECONDS, Contest, TimeLeft
from stagewise.pipeline.device_speeds import on_fastest, with_speeds
from stagewise.pipeline.trials import devices_are_real
from stagewise.planning.calibrate import FREE_ENGINE, EngineOverhead, with_engine_overhead
from stagewise.planning.interpolate import interpolated
from stagewise.planning.request import PlanRequest
from stagewise.planning.reserve import reserve_of
from stagewise.planning.search.search import (
    SYNTHESIS_EFFORT,
    CostsAt,
    Progress,
    SearchResult,
    search_for,
)
from stagewise.profiling.example import Example, agreed_costs

MEASURING_CELLS = 3.0  # seconds, unless plans are tried
_SHARE_OF_CELLS = 0.3  # of the time for everything, where plans are tried


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
    are tried, by default to ten steps, at least two seconds.
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

    def best(link: LinkCost, engine: EngineOverhead, effort: int) -> SearchResult:
        return _by_first(
            lambda: search_for(
                request,
                lambda count: with_engine_overhead(costs_at(count), engine),
                counts,
                link=link,
                reserve=reserve_of(example.where.type, posts=num_processes() > 1),
                effort=effort,
                progress=progress,
            )
        )

    began = time.perf_counter()
    found = best(link, FREE_ENGINE, FIRST_EFFORT if tries else SYNTHESIS_EFFORT)
    if tries:
        clock = TimeLeft(start, seconds, time.perf_counter() - began)
        found = Contest(example, counts, costs_at, link, clock, progress).decide(found, best)
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
