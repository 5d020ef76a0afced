"""Reports for the terminal, without torch.

1. `timeline_picture`: a Timeline, predicted or measured.
2. `plan_table`: a plan's predictions and measurements; `search_table`: the result of a search.
3. `parity_table`: the result of a parity check.
"""

from stagewise.report.parity_table import render_parity
from stagewise.report.timeline_picture import format_seconds, render_timeline

__all__ = ["format_seconds", "render_parity", "render_timeline"]
