"""Select modules by paths and patterns of paths, such as `["embed", "layers.*"]`."""

import difflib
import re
from collections.abc import Sequence

from stagewise.errors import ModelError


def selected(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return the `paths` that a pattern matches, in order; `*` matches anything but a dot.

    ModelError for a pattern without a match, and if one module contains another.
    """
    if isinstance(patterns, str):
        raise ModelError(f"cells got the string {patterns!r}; give a list: cells=[{patterns!r}]")
    if not patterns:
        raise ModelError("cells names no modules; name the model's blocks, such as ['layers.*']")
    found: set[str] = set()
    for pattern in patterns:
        own = {path for path in paths if path and _matches(pattern, path)}
        if not own:
            near = difflib.get_close_matches(pattern.replace("*", "0"), paths, 3, 0.3)
            raise ModelError(
                f"cells names {pattern!r}, but the model has no such module; the nearest names are "
                f"{', '.join(near) or ', '.join(p for p in paths if p and '.' not in p)}"
            )
        found |= own
    chosen = [path for path in paths if path in found]
    for path in chosen:
        inner = next((other for other in chosen if other.startswith(f"{path}.")), None)
        if inner is not None:
            raise ModelError(
                f"cells names {path!r} and, inside it, {inner!r}; name one of the two, since a "
                "cell is never cut"
            )
    return chosen


def _matches(pattern: str, path: str) -> bool:
    parts = (re.escape(part) for part in pattern.split("*"))
    return re.fullmatch("[^.]*".join(parts), path) is not None
