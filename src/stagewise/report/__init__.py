"""Reports for the terminal, without torch.

1. `plan_table`: a plan's predictions and measurements; `search_table`: the result of a search;
   `outlook_words`: whether a plan fits, and what else would.
2. `run_report`: what a run wrote, with its `run_tables`; `chrome_trace` is for Perfetto.
3. `parity_table`: the result of a parity check.

A Timeline is drawn by `timeline.timeline_picture`.
"""

from stagewise.report.parity_table import render_parity
from stagewise.timeline.timeline_picture import render_timeline
from stagewise.units import format_seconds

__all__ = ["format_seconds", "render_parity", "render_timeline"]
