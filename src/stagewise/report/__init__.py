"""Reports: a Timeline, predicted or measured, and parity, drawn for people. No torch."""

from stagewise.report.parity import render_parity
from stagewise.report.terminal import format_seconds, render_timeline

__all__ = ["format_seconds", "render_parity", "render_timeline"]
