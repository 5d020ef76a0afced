"""Reports: a Timeline, predicted or measured, drawn for people. No torch."""

from stagewise.report.terminal import format_seconds, render_timeline

__all__ = ["format_seconds", "render_timeline"]
