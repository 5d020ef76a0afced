"""Pictures as figures of plotly: plain dictionaries, which plotly.js draws in the browser.

For colour-blind readers, kinds of instructions also differ by pattern, and devices by dashes.
"""

from collections.abc import Mapping, Sequence
from html import escape

from stagewise.html_parts import BLACK, LOOKS
from stagewise.page.page_contents import Losses, ShownStep
from stagewise.page.waiting import waits
from stagewise.report import format_seconds
from stagewise.schedule.instruction import KINDS, Kind
from stagewise.timeline import Span, Timeline
from stagewise.units import size_in_words

Figure = dict[str, object]

DRAWN = 20_000  # instructions in one picture; browsers become slow beyond
_LABELLED = 2_000
_POINTS = 4_000  # of a curve of losses; of more, every n-th

_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
_DASHES = ("solid", "dash", "dot", "dashdot")
_PHASES = {"data": ".", "agree": "|", "reduce": "-", "optimizer": "\\"}
_IDLE = "rgba(128, 128, 128, 0.16)"


def timeline_figure(step: ShownStep) -> Figure:
    """Return a row per device, a bar per instruction, and a pale bar wherever a device is idle."""
    spans = sorted(step.timeline.spans, key=lambda span: span.start_seconds)[:DRAWN]
    before = {id(wait.span): str(wait) for wait in waits(step.timeline) if wait.span is not None}
    traces = [
        _bars([span for span in spans if span.instruction.kind == kind], kind, before)
        for kind in KINDS
    ]
    data = [trace for trace in traces if trace["x"]] + [_idle(step.timeline)]
    data += [_phase(step, what) for what in dict.fromkeys(each.what for each in step.around)]
    devices = step.timeline.num_devices
    layout = {
        "barmode": "overlay",
        "bargap": 0.18,
        "height": 110 + min(30 * devices + 20, 620),
        "uniformtext": {"mode": "hide", "minsize": 8},
        "xaxis": _time_axis(step),
        "yaxis": {
            "autorange": "reversed",
            "fixedrange": True,
            "type": "category",
            "categoryarray": [_device(device) for device in range(devices)],
            "categoryorder": "array",
        },
    }
    return {"data": data, "layout": layout}


def memory_figure(step: ShownStep) -> Figure:
    """Return a line per device: the bytes kept for the backward over the step.

    Measured ones are of a trial step, whose time is not that of the step shown.
    """
    largest = max((level for curve in step.memory for _, level in curve), default=0)
    unit = size_in_words(largest or 1).split()[1]
    scale = 1024.0 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    duration = 0 if step.measured else step.timeline.duration_seconds
    end = float(max([duration, *(time for curve in step.memory for time, _ in curve)]))
    axis: Figure = {"range": [0, end], "title": {"text": "time in a trial step"}}
    data = []
    for device, curve in enumerate(step.memory):
        times = [0.0, *(float(time) for time, _ in curve), end]
        levels = [0, *(level for _, level in curve)]
        levels.append(levels[-1])
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": _device(device),
                "x": times,
                "y": [level / scale for level in levels],
                "customdata": [
                    [size_in_words(level), format_seconds(time)]
                    for time, level in zip(times, levels, strict=True)
                ],
                "hovertemplate": "%{customdata[0]} from %{customdata[1]}",
                "line": _line(device, shape="hv"),
            }
        )
    layout = {
        "height": 260,
        "meta": {"own_time": bool(step.measured)},
        "xaxis": _time_axis(step) | (axis if step.measured else {}),
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero", "fixedrange": True},
    }
    return {"data": data, "layout": layout}


def losses_figure(runs: Sequence[Losses]) -> Figure:
    """Return each run's loss over its steps, with markers for the validation losses."""
    data: list[Figure] = []
    for index, run in enumerate(runs):
        name = escape(run.run)
        for what, points, mode, line in (
            ("", run.training, "lines", _line(index)),
            (", validation", run.validation, "lines+markers", _line(index, dash="dot")),
        ):
            if points:
                shown = points[:: 1 + len(points) // _POINTS]
                data.append(
                    {
                        "type": "scatter",
                        "mode": mode,
                        "name": f"{name}{what}",
                        "x": [step for step, _ in shown],
                        "y": [loss for _, loss in shown],
                        "hovertemplate": "step %{x}: %{y:.4f}",
                        "line": line,
                        "marker": {"size": 8, "symbol": "diamond"},
                    }
                )
    layout = {
        "height": 340,
        "xaxis": {"title": {"text": "step"}, "zeroline": False},
        "yaxis": {"title": {"text": "loss"}, "zeroline": False},
    }
    return {"data": data, "layout": layout}


def _bars(spans: Sequence[Span], kind: Kind, before: Mapping[int, str]) -> Figure:
    colour, pattern, text = LOOKS[kind]
    trace = _row_of_bars(
        [(span.device, float(span.start_seconds), float(span.seconds)) for span in spans],
        name=KINDS[kind].title,
        hovers=[
            [
                f"<b>{span.instruction}</b> {KINDS[kind].title}",
                f"stage {span.instruction.stage}, microbatch {span.instruction.microbatch}",
                f"{format_seconds(span.start_seconds)} to {format_seconds(span.end_seconds)}, "
                f"{format_seconds(span.seconds)}",
                before.get(id(span), "no wait before it"),
            ]
            for span in spans
        ],
    )
    marker = {"color": colour, "line": {"width": 0.5, "color": BLACK}}
    if pattern:
        marker["pattern"] = {
            "shape": pattern,
            "fillmode": "overlay",
            "fgopacity": 0.35,
            "size": 6,
            "solidity": 0.3,
        }
    trace["marker"] = marker
    if len(spans) <= _LABELLED:
        trace |= {
            "text": [str(span.instruction) for span in spans],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "insidetextfont": {"color": text},
        }
    return trace


def _idle(timeline: Timeline) -> Figure:
    found = [*waits(timeline)][:DRAWN]
    trace = _row_of_bars(
        [(wait.device, float(wait.start_seconds), float(wait.seconds)) for wait in found],
        name="idle",
        hovers=[
            [
                "<b>idle</b>",
                str(wait),
                f"{format_seconds(wait.start_seconds)} to {format_seconds(wait.end_seconds)}",
                "",
            ]
            for wait in found
        ],
    )
    return trace | {"marker": {"color": _IDLE}}


def _phase(step: ShownStep, what: str) -> Figure:
    own = [each for each in step.around if each.what == what]
    lengths = [each.end_seconds - each.start_seconds for each in own]
    trace = _row_of_bars(
        [(e.device, e.start_seconds, length) for e, length in zip(own, lengths, strict=True)],
        name=escape(what),
        hovers=[[f"<b>{escape(what)}</b>", format_seconds(each), "", ""] for each in lengths],
    )
    look = {"color": "#8C8C8C", "pattern": {"shape": _PHASES.get(what, "+"), "size": 5}}
    return trace | {"marker": look}


def _row_of_bars(
    bars: Sequence[tuple[int, float, float]], *, name: str, hovers: list[list[str]]
) -> Figure:
    """Return a trace of bars (device, start, length), with four lines of text on hover."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [_device(device) for device, _, _ in bars],
        "base": [start for _, start, _ in bars],
        "x": [length for _, _, length in bars],
        "customdata": hovers,
        "hovertemplate": "<br>".join(f"%{{customdata[{line}]}}" for line in range(4))
        + "<extra>%{y}</extra>",
    }


def _device(device: int) -> str:
    return f"device {device}"


def _time_axis(step: ShownStep) -> Figure:
    starts = [each.start_seconds for each in step.around]
    ends = [each.end_seconds for each in step.around]
    return {
        "range": [min([0.0, *starts]), max([float(step.timeline.duration_seconds), *ends])],
        "ticksuffix": "s",
        "exponentformat": "SI",
        "minexponent": 0,
        "zeroline": False,
    }


def _line(index: int, **rest: str) -> Figure:
    dash = _DASHES[index // len(_LINES) % len(_DASHES)]
    return {"color": _LINES[index % len(_LINES)], "dash": dash, "width": 2, **rest}
