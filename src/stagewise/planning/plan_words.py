"""A plan and its predictions as text."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape

from stagewise.costs import StageCost
from stagewise.planning.plan import Plan
from stagewise.schedule.text import schedule_in_html
from stagewise.timeline import Timeline
from stagewise.timeline.notebook_picture import timeline_in_html
from stagewise.units import format_seconds, size_in_words

MANY_STAGES = 12  # more are shown in groups


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Predicted or measured figures of one step; None if unknown."""

    step_seconds: float | None
    bubble_fraction: float | None
    peak_activation_bytes: tuple[int, ...]

    @staticmethod
    def of(timeline: Timeline, costs: Sequence[StageCost]) -> "Figures":
        """Return those of a timeline of stages with these costs."""
        return Figures(
            step_seconds=timeline.duration_seconds,
            bubble_fraction=timeline.bubble_fraction,
            peak_activation_bytes=timeline.peak_activation_bytes(costs),
        )


def predicted(plan: Plan) -> Figures:
    """Return a plan's predictions; none if its cells were not measured."""
    if not plan.cells:
        return Figures(step_seconds=None, bubble_fraction=None, peak_activation_bytes=())
    return Figures.of(plan.timeline, plan.engine_costs)


def cut_in_words(plan: Plan, names: Sequence[str]) -> str:
    """Return a line per stage with its cells; of many stages, one per run of equally large ones."""
    sizes = plan.balance
    starts = [0, *itertools.accumulate(sizes)]
    lines = []
    for size, run in itertools.groupby(range(len(sizes)), key=sizes.__getitem__):
        stages = list(run)
        together = [stages] if len(sizes) > MANY_STAGES else [[stage] for stage in stages]
        for first, *_, last in ([*own, own[-1]] for own in together):
            cells = names[starts[first] : starts[last] + size]
            inside = cells[0] if len(cells) == 1 else f"{cells[0]} to {cells[-1]}"
            which = f"stage {first}" if first == last else f"stages {first} to {last}"
            each = " each" if first != last else ""
            lines.append(f"{which}: {size} cell{'s' if size > 1 else ''}{each} ({inside})")
    return "\n".join(lines)


def _segments(plan: Plan) -> str:
    """Return how many cells are recomputed, and in how many segments, if there are any."""
    parts = [part for own in plan.segments for part in own]
    again = sum(size for size, recomputed in parts if recomputed)
    cells = sum(plan.balance)
    return f" ({again} of {cells} cells, in {len(parts)} segments)" if parts else ""


def _speeds(plan: Plan) -> str:
    listed = ", ".join(f"{speed:.3g}" for speed in plan.speeds)
    return f", devices of speeds {listed}" if plan.speeds else ""


def plan_in_words(plan: Plan) -> str:
    """Return the cut and the predictions of a plan as text."""
    names = [cell.name for cell in plan.cells] or [*map(str, range(sum(plan.balance)))]
    head = (
        f"{cut_in_words(plan, names)}\n"
        f"schedule {plan.schedule}, {plan.num_microbatches} microbatches, recompute "
        f"{plan.recompute}{_segments(plan)}{_speeds(plan)}\n"
    )
    if not plan.cells:
        return (
            f"{head}predicted: nothing, because a model on the meta device cannot be measured, or "
            "the plan was written without costs"
        )
    return (
        f"{head}predicted: step {format_seconds(plan.timeline.duration_seconds)}, bubble "
        f"{plan.timeline.bubble_fraction:.1%}, activations {_memory(plan.peak_activation_bytes)}"
    )


def plan_in_html(plan: Plan) -> str:
    """Return the same with a picture: of the predicted step, or else of the schedule."""
    words = f"<pre>{escape(plan_in_words(plan))}</pre>"
    if not plan.cells:
        return words + schedule_in_html(plan.built_schedule)
    return words + timeline_in_html(plan.timeline)


def _memory(peaks: Sequence[float]) -> str:
    """Return every device's peak; of many, the largest and the smallest."""
    if len(peaks) <= MANY_STAGES:
        return ", ".join(map(size_in_words, peaks))
    largest, smallest = max(peaks), min(peaks)
    return (
        f"{size_in_words(largest)} at most (device {peaks.index(largest)}), "
        f"{size_in_words(smallest)} at least (device {peaks.index(smallest)})"
    )


def plan_in_short(plan: Plan) -> str:
    """Return the plan as Python shows it: what is not as by default, and how many costs."""
    costs = f", cells=<costs of {len(plan.cells)} cells>" if plan.cells else ""
    given = {
        field.name: value
        for field in fields(plan)
        if (value := getattr(plan, field.name)) != field.default or field.name == "schedule"
        if field.name not in ("cells", "input_bytes", "link")
    }
    return f"Plan({', '.join(f'{name}={value!r}' for name, value in given.items())}{costs})"
