"""Reports, drawn for people. No torch.

1. `timeline`: a Timeline, predicted or measured.
2. `plan`: what a plan predicts, and beside it what was measured; `search`: what a search found.
3. `parity_table`: what a parity check found.
"""

from stagewise.report.parity_table import render_parity
from stagewise.report.timeline import format_seconds, render_timeline

__all__ = ["format_seconds", "render_parity", "render_timeline"]
