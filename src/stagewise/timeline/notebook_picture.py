"""A timeline in a notebook: a picture in which every instruction tells its times."""

from stagewise.html_parts import Bar, bars_of
from stagewise.schedule.instruction import KINDS
from stagewise.timeline.timeline import Timeline
from stagewise.units import format_seconds


def timeline_in_html(timeline: Timeline) -> str:
    """Return the picture under the step's time and its bubble."""
    rows: list[list[Bar]] = [[] for _ in range(timeline.num_devices)]
    for span in timeline.spans:
        kind = span.instruction.kind
        times = f"{format_seconds(span.start_seconds)} to {format_seconds(span.end_seconds)}"
        hover = f"{span.instruction}: {KINDS[kind].title}, {times}"
        bar = Bar(span.start_seconds, span.end_seconds, kind, str(span.instruction), hover)
        rows[span.device].append(bar)
    step = format_seconds(timeline.duration_seconds)
    return bars_of(f"step {step}, bubble {float(timeline.bubble_fraction):.1%}", rows)
