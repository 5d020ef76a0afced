"""The page of a plan: its predicted step beside those of its rivals, before anything is trained.

A search brings its runners-up. A plan that was asked for is compared with the other schedules on as
many devices, with as many microbatches.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress

from rich.table import Table

from stagewise.errors import StagewiseError
from stagewise.page.page_contents import Page, Section, ShownStep
from stagewise.planning import Plan, SearchResult
from stagewise.planning.bubble import bubble_causes
from stagewise.planning.plan import plan_from_costs
from stagewise.report import format_seconds
from stagewise.report.plan_table import cells_table, devices_table
from stagewise.report.search_table import explanation
from stagewise.schedule import SCHEDULES
from stagewise.units import size_in_words

_MOST = 20_000  # instructions of a rival
_MOST_CELLS = 400  # for which it takes a moment to cut the chain again


def plan_page(
    plan: Plan,
    record: Mapping[str, object],
    *,
    title: str,
    environment: Mapping[str, str],
    found: SearchResult | None = None,
) -> Page:
    """Return the page of a plan with measured or estimated costs, and of the search for it."""
    own = ShownStep(f"{short_name(plan)} (this plan)", plan.timeline, plan.engine_costs)
    others = _runners_up(found) if found is not None else rival_steps(plan)
    sections = [Section("Devices", [_causes(plan), devices_table(plan)])]
    if found is not None:
        sections.append(Section("The search", [*explanation(found)]))
    sections.append(Section("The plan", [str(plan), cells_table(plan)]))
    return Page(
        title=title,
        summary={
            "step, predicted": format_seconds(plan.timeline.duration_seconds),
            "bubble": f"{plan.timeline.bubble_fraction:.1%}",
            "schedule": plan.schedule,
            "devices": str(plan.num_devices),
            "microbatches": str(plan.num_microbatches),
            "peak activations": size_in_words(max(plan.peak_activation_bytes)),
        },
        record=record,
        steps=[own, *others],
        sections=sections,
        environment=environment,
    )


def short_name(plan: Plan) -> str:
    """Return a plan in a few words."""
    again = "" if not plan.recomputes else f", recompute {plan.recompute}"
    return f"{plan.schedule}, {plan.num_microbatches} microbatches{again}"


def _runners_up(found: SearchResult) -> Iterator[ShownStep]:
    for rank, rival in enumerate(found.runners_up, start=1):
        if rival.option.num_instructions <= _MOST:
            plan = rival.plan()
            yield ShownStep(f"{rank}. {rival}", plan.timeline, plan.engine_costs)


def rival_steps(plan: Plan) -> Iterator[ShownStep]:
    """Yield the steps of the named schedules that these cells, devices and microbatches allow."""
    if len(plan.cells) > _MOST_CELLS:
        return
    for name, row in SCHEDULES.items():
        each = row.stages_per_device
        if name == plan.schedule or 4 * plan.num_devices * plan.num_microbatches * each > _MOST:
            continue
        with suppress(StagewiseError):  # too few cells, or microbatches that it does not take
            rival = plan_from_costs(
                plan.cells,
                schedule=name,
                num_devices=plan.num_devices,
                num_microbatches=plan.num_microbatches,
                recompute=plan.recompute,
                link=plan.link,
                speeds=plan.speeds,
                input_bytes=plan.input_bytes,
            )
            yield ShownStep(short_name(rival), rival.timeline, rival.engine_costs)


def _causes(plan: Plan) -> Table:
    causes, step = bubble_causes(plan), plan.timeline.duration_seconds
    table = Table(title="Why devices are idle (sums over all devices)", title_justify="left")
    for heading in ("cause", "share of all devices' time", "seconds"):
        table.add_column(heading)
    for cause, share in (
        ("fill and drain", causes.fill_and_drain),
        ("unequal stages", causes.imbalance),
        ("waiting for transfers", causes.communication),
        ("all idle time", causes.total),
    ):
        table.add_row(cause, f"{share:.1%}", format_seconds(share * step * plan.num_devices))
    return table
