"""Tables and small pictures as HTML, for notebooks and pages, from plain values.

Every text is escaped. The colours are those of Okabe and Ito (Color Universal Design, 2008), which
colour-blind readers can tell apart.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

BLACK, WHITE = "#111111", "#FFFFFF"
LOOKS = {  # of every kind of instruction, by its letter: colour, plotly's pattern, text
    "F": ("#0072B2", "", WHITE),
    "B": ("#E69F00", "", BLACK),
    "I": ("#56B4E9", "/", BLACK),
    "W": ("#009E73", ".", BLACK),
    "R": ("#CC79A7", "x", BLACK),
    "P": ("#F0E442", "", BLACK),
    "U": ("#F0E442", "/", BLACK),
    "S": ("#F0E442", ".", BLACK),
    "G": ("#D55E00", "x", BLACK),
}

_MOST_BARS = 5_000
_LONG = 40  # characters of a cell that may be broken
_WIDTH, _MARGIN, _ROW, _LETTER = 900, 64, 26, 7.0  # in pixels
_IDLE = "rgba(128,128,128,0.16)"


class Bar(NamedTuple):
    """An instruction of kind `letter` from `start` to `end`; `hover` appears when pointed at."""

    start: float
    end: float
    letter: str
    label: str
    hover: str


def table_of(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that scrolls sideways, by keyboard too; the first column names the row."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(map(_cell, rest))}</tr>'
        for first, *rest in rows
    )
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(title or "table")}">'
        f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    style = ' class="long"' if len(text) > _LONG else ""
    return f"<td{style}>{escape(text)}</td>"


def bars_of(title: str, rows: Sequence[Sequence[Bar]]) -> str:
    """Return a picture with a row per device, time to the right, under its title."""
    end = max((bar.end for row in rows for bar in row), default=0)
    heading = f"<div><b>{escape(title)}</b></div>"
    count = sum(map(len, rows))
    if not end or count > _MOST_BARS:
        return f"{heading}<div>{count:,} instructions: too many to draw here</div>" * bool(count)
    scale = (_WIDTH - _MARGIN) / float(end)
    inner = "".join(_row(device, row, scale) for device, row in enumerate(rows))
    height = _ROW * len(rows)
    return (
        f'{heading}<svg viewBox="0 0 {_WIDTH} {height}" width="100%" role="img" '
        f'aria-label="{escape(title)}" style="max-width:{_WIDTH}px;'
        f'font:11px sans-serif">{inner}</svg>'
    )


def _row(device: int, row: Sequence[Bar], scale: float) -> str:
    top, height = _ROW * device + 2, _ROW - 4
    parts = [
        f'<text x="0" y="{top + 15}" fill="currentColor">device {device}</text>'
        f'<rect x="{_MARGIN}" y="{top}" width="{_WIDTH - _MARGIN}" height="{height}" '
        f'fill="{_IDLE}"/>'
    ]
    for bar in row:
        colour, _, ink = LOOKS[bar.letter]
        left, width = _MARGIN + float(bar.start) * scale, float(bar.end - bar.start) * scale
        fits = len(bar.label) * _LETTER <= width
        label = (
            f'<text x="{left + width / 2:.2f}" y="{top + 15}" fill="{ink}" '
            f'text-anchor="middle" pointer-events="none">{escape(bar.label)}</text>'
        )
        parts.append(
            f'<rect x="{left:.2f}" y="{top}" width="{width:.2f}" height="{height}" '
            f'fill="{colour}" stroke="{BLACK}" stroke-width="0.5">'
            f"<title>{escape(bar.hover)}</title></rect>{label * fits}"
        )
    return "".join(parts)
