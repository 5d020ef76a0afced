"""A griffe extension: examples in docstrings, written as `>>>`, become code blocks on the page.

Markdown would read `>>>` as three quotations within each other.
"""

import re
from textwrap import dedent
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^ *>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)  # up to an empty line


class Doctests(griffe.Extension):
    """Fence every example."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object, when all have been read."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(example: re.Match[str]) -> str:
    return f"\n```pycon\n{dedent(example[0])}\n```"
