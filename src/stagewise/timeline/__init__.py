"""What ran when on every device, predicted or measured, without torch.

1. `timeline`: the type that simulator and executor return, and what follows from it.
2. `timeline_picture` draws it in the terminal, `notebook_picture` in a notebook.
"""

from stagewise.timeline.timeline import (
    Changes,
    Curve,
    Span,
    SpanRecord,
    Timeline,
    changes_by_kind,
    kept_bytes,
)

__all__ = [
    "Changes",
    "Curve",
    "Span",
    "SpanRecord",
    "Timeline",
    "changes_by_kind",
    "kept_bytes",
]
