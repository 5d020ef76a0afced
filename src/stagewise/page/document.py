"""A page as one HTML file that works offline: plotly.js, style, script and numbers are inside.

Texts come from recipes and file names, so all are escaped, and the browser is told to run no other
script than the two that this file names by their digest, and to load nothing from anywhere.
"""

import base64
import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from stagewise.errors import UsageError
from stagewise.page import figures as draw
from stagewise.page import fragments as write
from stagewise.page.page_contents import Page, ShownStep

_MISSING = (
    "pages need plotly, which draws their pictures, but it is not installed; install it with: "
    "pip install 'stagewise[page]'"
)


_FROM = {False: "'none'", True: "'self'"}  # where a page may ask for more, if it is live
_LOSSES = (
    '<div class="plot" data-plot="losses" role="img" aria-label="Loss over steps, a line per run">'
    "</div>"
)


def check_html(path: Path) -> None:
    """Raise UsageError if a page cannot be written to `path`."""
    plotly_script()
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise UsageError(f"--html {path} {what}; give a file to write, such as --html page.html")


def write_html(page: Page, path: Path) -> None:
    """Write the page; a reader sees the old file or the new one, never half of one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(document(page), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UsageError(
            f"--html {path} cannot be written ({error.strerror}); give another file"
        ) from error


def document(page: Page, version: str = "") -> str:
    """Return the page as HTML; one with a `version` asks its server for the next."""
    plotly, script, style = plotly_script(), _asset("page.js"), _asset("page.css")
    parts = html_parts_of(page)
    policy = (
        f"default-src 'none'; script-src {_digest(plotly)} {_digest(script)}; "
        f"style-src 'unsafe-inline'; img-src data: blob:; connect-src {_FROM[bool(version)]}"
    )
    timelines = _section("Timeline", _panes(page.steps[: page.num_drawn])) if page.steps else ""
    losses = _section("Loss", _LOSSES) if page.losses else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>{style}</style></head><body data-version="{escape(version)}">
<header><h1>{escape(page.title)}</h1>
<button type="button" id="theme" hidden>Dark mode</button></header>
<main><p id="live" role="status">{"This page follows the run." if version else ""}</p>
<div data-part="summary">{parts["summary"]}</div>
<noscript><p class="note">Pictures need JavaScript; the tables hold the same numbers.</p></noscript>
{timelines}{losses}<div data-part="tables">{parts["tables"]}</div>
<p><button type="button" id="save" hidden>Save the numbers as JSON</button></p></main>
<script type="application/json" id="numbers">{_embedded(numbers_of(page))}</script>
<script type="application/json" id="figures">{_embedded(figures_of(page))}</script>
<script>{plotly}</script><script>{script}</script></body></html>
"""


def numbers_of(page: Page) -> dict[str, object]:
    """Return all that the page shows as JSON-ready values."""
    return {
        **page.record,
        "steps": [step.to_record(drawn=n < page.num_drawn) for n, step in enumerate(page.steps)],
    }


def figures_of(page: Page) -> dict[str, object]:
    """Return the page's pictures for plotly."""
    steps = [
        {
            "name": step.name,
            "timeline": draw.timeline_figure(step),
            "memory": draw.memory_figure(step) if step.memory else None,
        }
        for step in page.steps[: page.num_drawn]
    ]
    return {"steps": steps, "losses": draw.losses_figure(page.losses) if page.losses else None}


def html_parts_of(page: Page) -> dict[str, str]:
    """Return the page's tables, by the part of the page that they fill."""
    parts = [_section("Where the time goes", _times(page.steps))] if page.steps else []
    for section in page.sections:
        parts.append(_section(section.title, "".join(map(write.html_of, section.parts))))
    if page.losses:
        parts.append(_section("Losses", write.losses(page.losses)))
    if page.environment:
        parts.append(_section("Environment", write.pairs(page.environment, "environment")))
    return {"summary": write.pairs(page.summary, "summary"), "tables": "".join(parts)}


def _times(steps: Sequence[ShownStep]) -> str:
    shown = "".join(write.where_time_goes(step) + write.instructions(step) for step in steps[:2])
    return (write.comparison(steps) if len(steps) > 1 else "") + shown


def _panes(steps: Sequence[ShownStep]) -> str:
    """Return one or two timelines above each other, and below them their memory."""
    panes, memories = [], []
    for pane in range(min(2, len(steps))):
        choices = "".join(
            f'<option value="{index}"{" selected" * (index == pane)}>{escape(step.name)}</option>'
            for index, step in enumerate(steps)
        )
        label = f"Timeline {pane + 1}"
        panes.append(
            f'<div class="pane"><label>{label} <select data-pane="{pane}">{choices}</select>'
            f'</label><div class="plot" tabindex="0" role="application" aria-label="{label}. Arrow '
            'keys step through instructions and devices, plus and minus zoom, 0 shows all." '
            f'data-plot="timeline" data-pane="{pane}"></div></div>'
        )
        if any(step.memory for step in steps):
            memories.append(
                f'<div class="pane"><div>Memory of {label.lower()}</div>'
                f'<div class="plot" data-plot="memory" data-pane="{pane}" role="img" '
                f'aria-label="Activation memory of {label}, a line per device"></div></div>'
            )
    buttons = "".join(
        f'<button type="button" data-zoom="{name}">{text}</button>'
        for name, text in (
            ("in", "Zoom in"),
            ("out", "Zoom out"),
            ("left", "Earlier"),
            ("right", "Later"),
            ("all", "Show all"),
        )
    )
    return (
        f'<div class="buttons" hidden>{buttons}</div><p id="said" role="status" '
        f'aria-live="polite"></p>{"".join([*panes, *memories])}'
        '<p class="note">Drag sideways to zoom, point at a bar to read it. By keyboard: focus a '
        "timeline, then arrow keys, plus, minus and 0 (the lines of memory need a mouse). The "
        "tables below hold the same numbers.</p>"
    )


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _embedded(value: object) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """Return plotly.js; raise UsageError if plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError(_MISSING) from None
    return str(get_plotlyjs())


def environment_here(**more: str) -> dict[str, str]:
    """Return the versions and the machine that this process runs with."""
    found = {**more, "command": " ".join(sys.argv[1:])}
    for name in ("stagewise", "torch", "numpy", "plotly"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {
        **found,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "CPU": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
