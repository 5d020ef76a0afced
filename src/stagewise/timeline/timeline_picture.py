"""A timeline in the terminal: a row per device, time to the right, idle time as dots.

Every column shows the instruction that runs in the middle of its time interval. An instruction
starts with its letter and microbatch and is filled with a character of its kind, so the drawing is
readable without colour; one too short for its name keeps the letter, and one shorter than a column
may not appear at all. If devices hold several stages, the stage precedes the letter; if that is too
long, a lower-case letter says that it is not the device's first stage.
"""

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from stagewise.schedule.instruction import KINDS
from stagewise.timeline.timeline import Span, Timeline
from stagewise.units import format_seconds

# Fill character and style of each kind in turn.
_PALETTE = (
    ("=", "white on blue"),
    ("#", "black on green"),
    ("+", "black on cyan"),
    ("-", "black on magenta"),
    ("~", "black on yellow"),
    ("%", "white on red"),
    (":", "black on white"),
    ("*", "black on yellow"),
    ("!", "white on red"),
)
_LOOKS = dict(zip(KINDS, _PALETTE, strict=True))
_IDLE = "."
_MIN_COLUMNS = 10
_REGULAR = 1e-6  # spans this close to whole multiples of the shortest are drawn as such


def render_timeline(timeline: Timeline, *, width: int = 100) -> RenderableType:
    """Draw `timeline` in at most `width` columns (more only if that is too few).

    Below follow the legend, each device's busy share of the step and its peak number of
    microbatches in flight, then the step time and the bubble fraction.
    """
    names = [f"device {device}" for device in range(timeline.num_devices)]
    stages = [
        tuple(sorted({s.instruction.stage for s in timeline.spans if s.device == device}))
        for device in range(timeline.num_devices)
    ]
    margin = max(map(len, names), default=0) + 2
    scale = _columns_per_second(timeline, max(_MIN_COLUMNS, width - margin))
    columns = round(timeline.duration_seconds * scale)
    with_stage = any(len(own) > 1 for own in stages)
    end = format_seconds(timeline.duration_seconds)
    lines = [Text(" " * margin + "0" + end.rjust(columns - 1), style="dim")]
    for device, name in enumerate(names):
        line = Text(name.ljust(margin))
        spans = [span for span in timeline.spans if span.device == device]
        for text, style in _runs(spans, columns, scale, stages[device] if with_stage else ()):
            line.append(text, style)
        lines.append(line)
    lines += _legend(timeline, with_stage)
    lines += [Text(), *_device_lines(timeline, names, stages, with_stage), _summary(timeline)]
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
    return Group(*lines)


def _columns_per_second(timeline: Timeline, room: int) -> float:
    """Return the scale that fits; if all times are multiples of a unit, in whole columns."""
    if not timeline.duration_seconds:
        return 0
    lengths = [span.seconds for span in timeline.spans if span.seconds]
    unit = min(lengths)
    times = [*lengths, *(span.start_seconds for span in timeline.spans)]
    regular = all(abs(time / unit - round(time / unit)) < _REGULAR for time in times)
    columns_per_unit = int(room / (timeline.duration_seconds / unit) + _REGULAR)
    if regular and columns_per_unit >= 1:
        return columns_per_unit / unit
    return room / timeline.duration_seconds


def _runs(
    spans: list[Span], columns: int, scale: float, stages: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    """Yield text and style of every run of columns with the same instruction, or none.

    `stages` are the device's, if they are to be shown.
    """
    shown: list[Span | None] = [None] * columns
    for span in spans:
        # Columns whose middles lie in the span.
        first, last = (
            round(float(seconds * scale) + _REGULAR)
            for seconds in (span.start_seconds, span.end_seconds)
        )
        shown[first:last] = [span] * (min(last, columns) - first)
    for running, stretch in groupby(shown):
        length = len(list(stretch))
        if running is None:
            yield _IDLE * length, "dim"
            continue
        kind, microbatch = running.instruction.kind, running.instruction.microbatch
        fill, style = _LOOKS[kind]
        later = running.instruction.stage in stages[1:]
        letter = kind.lower() if later else str(kind)
        labels = (str(running.instruction) if stages else "", f"{letter}{microbatch}", letter)
        label = next(text for text in labels if text and len(text) <= length)
        yield label.ljust(length, fill), style


def _legend(timeline: Timeline, with_stage: bool) -> list[Text]:
    used = {span.instruction.kind for span in timeline.spans}
    legend = Text()
    for kind, (fill, style) in _LOOKS.items():
        if kind in used:
            legend.append(f"{kind}0{fill}", style).append(f" {KINDS[kind].title}  ")
    legend.append(_IDLE * 3, "dim").append(" idle  (0: the microbatch)")
    if not with_stage:
        return [legend]
    return [legend, Text("1F0: stage 1; f0: a stage that is not the device's first")]


def _device_lines(
    timeline: Timeline, names: list[str], stages: list[tuple[int, ...]], with_stage: bool
) -> Iterator[Text]:
    for device, (name, busy) in enumerate(zip(names, timeline.busy_seconds, strict=True)):
        share = float(busy / timeline.duration_seconds) if timeline.duration_seconds else 0.0
        peak = timeline.peak_in_flight(device)
        own = f", stages {', '.join(map(str, stages[device]))}" if with_stage else ""
        yield Text(f"{name:<{len(names[-1])}}  busy {share:>6.1%}, at most {peak} in flight{own}")


def _summary(timeline: Timeline) -> Text:
    return Text.assemble(
        "step ",
        (format_seconds(timeline.duration_seconds), "bold"),
        ", bubble ",
        (f"{float(timeline.bubble_fraction):.1%}", "bold"),
        " of all devices' time",
    )
