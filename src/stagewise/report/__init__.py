"""Reports: a Timeline, predicted or measured, and parity, drawn for people. No torch."""

from stagewise.report.parity_table import render_parity
from stagewise.report.timeline import format_seconds, render_timeline

__all__ = ["format_seconds", "render_parity", "render_timeline"]
