"""The reports of the terminal as HTML: the same tables, with every text escaped."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from stagewise.html_parts import table_of
from stagewise.page.page_contents import Losses, ShownStep
from stagewise.page.waiting import waits
from stagewise.report import format_seconds
from stagewise.schedule.instruction import KINDS
from stagewise.units import size_in_words

ROWS = 2_000  # of one table of instructions


def html_of(part: RenderableType) -> str:
    """Return what the terminal would show."""
    if isinstance(part, Table):
        rows = zip(*(map(_plain, column.cells) for column in part.columns), strict=True)
        headings = [_plain(column.header) for column in part.columns]
        caption = _plain(part.caption) if part.caption else ""
        below = f'<p class="note">{escape(caption)}</p>' if caption else ""
        return table_of(_plain(part.title or ""), headings, rows) + below
    return f'<p class="text">{escape(_plain(part))}</p>'


def pairs(entries: Mapping[str, str], style: str) -> str:
    """Return names with their values."""
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in entries.items()
    )
    return f'<dl class="{style}">{inner}</dl>'


def comparison(steps: Sequence[ShownStep]) -> str:
    """Return the steps side by side, relative to the first."""
    first = float(steps[0].timeline.duration_seconds)
    rows = []
    for step in steps:
        seconds = float(step.timeline.duration_seconds)
        peaks = [max((level for _, level in curve), default=0) for curve in step.memory]
        rows.append(
            [
                step.name,
                format_seconds(seconds),
                f"{seconds / first - 1:+.1%}" if first and step is not steps[0] else "",
                f"{float(step.timeline.bubble_fraction):.1%}",
                size_in_words(max(peaks)) if peaks else "-",
                str(max(map(step.timeline.peak_in_flight, range(step.timeline.num_devices)))),
            ]
        )
    headings = "step", "time", "against the first", "bubble", "peak activations", "most in flight"
    return table_of("Side by side (memory: the fullest device)", headings, rows)


def where_time_goes(step: ShownStep) -> str:
    """Return each device's time by kind of instruction; a row adds up to the step."""
    timeline = step.timeline
    kinds = [kind for kind in KINDS if any(s.instruction.kind == kind for s in timeline.spans)]
    duration, rows = float(timeline.duration_seconds), []
    for device in range(timeline.num_devices):
        own = [span for span in timeline.spans if span.device == device]
        spent = [sum(float(s.seconds) for s in own if s.instruction.kind == k) for k in kinds]
        idle = duration - sum(spent)
        share = f"{idle / duration:.1%}" if duration else "-"
        rows.append([f"device {device}", *map(format_seconds, spent), format_seconds(idle), share])
    headings = ["device", *(KINDS[kind].title for kind in kinds), "idle", "idle share"]
    return table_of(f"Where the time goes: {step.name}", headings, rows)


def losses(runs: Sequence[Losses]) -> str:
    """Return the runs side by side: how far, and how low."""
    rows = []
    for run in runs:
        steps, last = run.training[-1] if run.training else ("-", math.nan)
        least = min((loss for _, loss in run.validation), default=math.nan)
        shown = ("-" if math.isnan(loss) else f"{loss:.4f}" for loss in (last, least))
        rows.append([run.run, str(steps), *shown])
    return table_of("Runs", ["run", "steps", "last loss", "least validation loss"], rows)


def instructions(step: ShownStep) -> str:
    """Return a folded table of every instruction, what the picture shows on hover."""
    spans = sorted(step.timeline.spans, key=lambda span: (span.start_seconds, span.device))
    before = {id(wait.span): str(wait) for wait in waits(step.timeline) if wait.span is not None}
    rows = (
        [
            str(span.instruction),
            str(span.device),
            str(span.instruction.stage),
            KINDS[span.instruction.kind].title,
            str(span.instruction.microbatch),
            format_seconds(span.start_seconds),
            format_seconds(span.end_seconds),
            before.get(id(span), ""),
        ]
        for span in spans[:ROWS]
    )
    headings = "instruction", "device", "stage", "kind", "microbatch", "start", "end", "before it"
    more = f" (the first {ROWS:,} of {len(spans):,}; all are in the JSON)" * (len(spans) > ROWS)
    title = f"Instructions: {step.name}{more}"
    return f"<details><summary>{escape(title)}</summary>{table_of(title, headings, rows)}</details>"


_CONSOLE = Console(width=120, color_system=None)


def _plain(part: RenderableType) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Text):
        return part.plain
    options: ConsoleOptions = _CONSOLE.options
    lines = _CONSOLE.render_lines(part, options, pad=False)
    return "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)
