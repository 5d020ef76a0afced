"""The result of a search on one screen: the plan, where its time goes, and the alternatives."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import inf

from rich.console import RenderableType
from rich.table import Table

from stagewise.planning import Plan, SearchResult
from stagewise.planning.alternatives import Outlook, Room, outlook_of
from stagewise.planning.bubble import bubble_causes
from stagewise.planning.search.evaluate import EvaluatedPlan
from stagewise.report import format_seconds
from stagewise.report.outlook_words import outlook_in_words
from stagewise.units import size_in_words

_SHOWN = 6  # rejected options


def explanation(result: SearchResult) -> Iterator[RenderableType]:
    """Yield text and tables, from the decision to the details."""
    plan, chosen = result.plan, result.chosen
    causes = bubble_causes(plan)
    yield f"fastest plan: {chosen}"
    yield (
        f"step {format_seconds(chosen.seconds)} predicted, {result.distance:.1%} above the lower "
        f"bound of any plan, {format_seconds(result.bound_seconds)}; the bound of this cut is "
        f"{format_seconds(result.schedule_bound_seconds)}"
    )
    if result.tried:
        yield _tried(result)
    yield (
        f"bubble {causes.total:.1%}: fill and drain {causes.fill_and_drain:.1%}, imbalance "
        f"{causes.imbalance:.1%}, communication {causes.communication:.1%}"
    )
    yield _cut(plan, chosen)
    yield _devices(result)
    if result.runners_up:
        yield _runners_up(result)
    yield from outlook_in_words(_outlook(result), plan)
    if besides := str(result.reserve):
        yield f"memory includes {besides}"
    if result.rejected:
        yield _rejected(result)


def as_record(result: SearchResult) -> dict[str, object]:
    """Return the same as JSON-ready values, with everything that was rejected."""
    causes = bubble_causes(result.plan)
    return {
        "chosen": str(result.chosen),
        "step_seconds": result.chosen.seconds,
        "bound_seconds": result.bound_seconds,
        "schedule_bound_seconds": result.schedule_bound_seconds,
        "partition_gap": result.chosen.partition_gap,
        "bubble": asdict(causes),
        "device_bytes": result.chosen.device_bytes,
        "memory_bytes": result.memory_bytes,
        "state_factor": result.state_factor,
        "reserve": asdict(result.reserve),
        "runners_up": [
            {"what": str(p), "step_seconds": p.seconds, "device_bytes": p.device_bytes}
            for p in result.runners_up
        ],
        "rejected": [{"what": each.what, "reason": each.reason} for each in result.rejected],
        "work": asdict(result.work),
        "tried": [asdict(each) for each in result.tried],
    }


def _cut(plan: Plan, chosen: EvaluatedPlan) -> str:
    sizes = ", ".join(map(str, plan.balance))
    text = f"cells per stage: {sizes}"
    if chosen.partition_gap > 1e-9:
        text += f" (largest load within {chosen.partition_gap:.2%} of the lower bound)"
    if plan.replicas:
        text += f"\ndevices per stage: {', '.join(map(str, plan.replicas))}"
    if plan.segments:
        number = sum(size for parts in plan.segments for size, recomputed in parts if recomputed)
        text += f"\nrecomputed: {number} of {sum(plan.balance)} cells, in segments"
    return text


def _devices(result: SearchResult) -> Table:
    plan, chosen = result.plan, result.chosen
    table = Table(title="Devices", title_justify="left")
    for heading in ("device", "stages", "cells", "busy", "memory", "of the cap", "activations"):
        table.add_column(heading, justify="right" if heading != "device" else "left")
    peaks = plan.peak_activation_bytes
    for device, needs in enumerate(chosen.device_bytes):
        stages = [s for s, devices in enumerate(chosen.placement) if device in devices]
        share = "-" if result.caps is None else f"{needs / result.caps[device]:.0%}"
        table.add_row(
            str(device),
            ", ".join(map(str, stages)),
            str(sum(plan.balance[stage] for stage in stages)),
            f"{chosen.busy_seconds[device] / chosen.seconds:.1%}",
            size_in_words(needs),
            share,
            size_in_words(peaks[device]),
        )
    return table


def _tried(result: SearchResult) -> Table:
    table = Table(title=f"Tried, on {result.machine}", title_justify="left")
    headings = "plan", "predicted", "measured", "steps", "with corrected costs"
    for heading in headings:
        table.add_column(heading, justify="right" if heading != "plan" else "left")
    for each in result.tried:
        table.add_row(
            each.what,
            format_seconds(each.predicted_seconds),
            format_seconds(each.measured_seconds),
            str(each.num_steps),
            format_seconds(each.corrected_seconds),
        )
    return table


def _runners_up(result: SearchResult) -> Table:
    table = Table(title="Runners-up", title_justify="left")
    for heading in ("plan", "step", "slower by", "largest memory"):
        table.add_column(heading, justify="right" if heading != "plan" else "left")
    for plan in result.runners_up:
        table.add_row(
            str(plan),
            format_seconds(plan.seconds),
            f"{plan.seconds / result.chosen.seconds - 1:.1%}",
            size_in_words(max(plan.device_bytes)),
        )
    return table


def _outlook(result: SearchResult) -> Outlook:
    """Return what would do instead; every searched plan fits its cap, if there is one."""
    cap = result.memory_bytes
    room = Room(
        device="the devices",
        memory_bytes=inf if cap is None else min(cap) if isinstance(cap, Sequence) else cap,
        state_factor=result.state_factor,
        reserve=result.reserve,
    )
    return outlook_of(result.plan, room)


def _rejected(result: SearchResult) -> str:
    lines = [f"rejected: {len(result.rejected)}"]
    lines += [f"  {each}" for each in result.rejected[:_SHOWN]]
    if len(result.rejected) > _SHOWN:
        lines.append(f"  and {len(result.rejected) - _SHOWN} more: see --json")
    return "\n".join(lines)
