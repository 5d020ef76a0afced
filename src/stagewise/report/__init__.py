"""Reports for the terminal, without torch.

1. `timeline`: a Timeline, predicted or measured.
2. `plan`: a plan's predictions and measurements; `search`: the result of a search.
3. `parity_table`: the result of a parity check.
"""

from stagewise.report.parity_table import render_parity
from stagewise.report.timeline import format_seconds, render_timeline

__all__ = ["format_seconds", "render_parity", "render_timeline"]
