"""Record what a model's code asks about symbolic sizes while torch.export traces it.

torch.export answers `x.shape[1] > 20` with the example's size and adds a guard. Every guard becomes
a condition on later calls, whoever asked: an operator that takes a number (one_hot's classes,
chunk's pieces) bakes it in like a branch of the model. Three cases need special care:

- *Layout.* Whether a tensor is contiguous, or how a view traverses its memory, only decides
  strides, which operators determine again; but a guard on it would needlessly refuse other lengths,
  and hide that the model asks the same. So it is answered without a guard.
- *Samples.* torch.export assumes two or more, without a guard. If the model's own code asks, that
  is recorded too, since a microbatch may be one sample.
- *Text.* The text of a size is a symbol's name. The model's own code gets the example's number
  instead. That is mostly for messages; a second trace with other numbers shows whether it matters.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from stagewise.model.export import opaque_modules
from stagewise.model.promised_sizes import Condition

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_MODELS = f"{_TORCH}nn{os.sep}"  # torch.nn's Python code counts as the model's
_SYMBOLIC = (f"{_TORCH}fx{os.sep}", f"{_TORCH}__init__.py", __file__)
_LAYOUT = f"{_TORCH}_prims_common{os.sep}"
_VIEWS = {"_reshape_view_helper_core_alg", "_collapse_view_helper"}
_TEXT = ("__repr__", "__str__", "__format__")


@dataclass
class AskedSizes:
    """What was asked: each assumption, with the model's line that was running."""

    places: dict[sympy.Basic, str] = field(default_factory=dict)
    granted: dict[sympy.Basic, str] = field(default_factory=dict)  # without a guard
    texts: dict[sympy.Basic, str] = field(default_factory=dict)  # sizes converted to text

    def conditions(self, shapes: ShapeEnv, *, texts_decide: bool) -> tuple[Condition, ...]:
        """Return all assumptions over the sizes that remain symbolic."""
        asked = {guard.expr: self.places.get(guard.expr, "torch.export") for guard in shapes.guards}
        texts = self.texts if texts_decide else {}
        found: dict[sympy.Basic, Condition] = {}
        for expression, place in (*asked.items(), *self.granted.items(), *texts.items()):
            holds = shapes.replace(expression)
            if holds is not sympy.true and holds.free_symbols:
                found.setdefault(holds, Condition(holds=holds, place=place))
        return tuple(found.values())


@contextmanager
def asked_sizes(*, other_texts: bool = False) -> Iterator[AskedSizes]:
    """Record what is asked inside; `other_texts`: sizes print as other numbers."""
    asked = AskedSizes()
    evaluate: Any = ShapeEnv.evaluate_expr

    def noting(shapes: ShapeEnv, expression: Any, *args: Any, **kwargs: Any) -> Any:
        asker = _asker()
        if asker is not None and _is_layout(asker):
            with shapes.suppress_guards():
                return evaluate(shapes, expression, *args, **kwargs)
        count = len(shapes.guards)
        answer = evaluate(shapes, expression, *args, **kwargs)
        if len(shapes.guards) > count:
            for guard in shapes.guards[count:]:
                asked.places[guard.expr] = _line(asker)
        elif _is_models(asker) and answer in (sympy.true, sympy.false):
            holds = expression if answer is sympy.true else sympy.Not(expression)
            asked.granted.setdefault(holds, _line(asker))
        return answer

    before = {name: torch.SymInt.__dict__.get(name) for name in _TEXT}
    ShapeEnv.evaluate_expr = noting  # type: ignore[assignment, method-assign]
    for name in _TEXT:
        setattr(torch.SymInt, name, _as_number(name, asked.texts, other_texts))
    try:
        yield asked
    finally:
        ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign]
        for name, method in before.items():
            if method is None:
                delattr(torch.SymInt, name)
            else:
                setattr(torch.SymInt, name, method)


def _as_number(name: str, texts: dict[sympy.Basic, str], other: bool) -> Any:
    """Return the method `name` of a size, which gives the model's own code a number's text."""
    own: Any = getattr(torch.SymInt, name)

    def text(size: torch.SymInt, *args: str) -> str:
        frame = sys._getframe(1)
        number = size.node.hint
        if number is None or frame.f_code.co_filename.startswith(_TORCH):
            return str(own(size, *args))
        texts.setdefault(sympy.Eq(size.node.expr, number), _line(frame))
        return str(getattr(100 * number + 1 if other else number, name)(*args))

    return text


def _asker() -> FrameType | None:
    """Return the innermost frame outside the machinery of symbolic sizes."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_SYMBOLIC):
        frame = frame.f_back
    return frame


def _is_layout(frame: FrameType) -> bool:
    file, function = frame.f_code.co_filename, frame.f_code.co_name
    return file.startswith(_LAYOUT) or (file.startswith(_TORCH) and function in _VIEWS)


def _is_models(frame: FrameType | None) -> bool:
    """Return whether the model's own code asks; an opaque module does not count: it asks again."""
    if frame is None:
        return False
    file = frame.f_code.co_filename
    if file.startswith(_TORCH) and not file.startswith(_MODELS):
        return False
    while frame is not None:
        if frame.f_code.co_filename == opaque_modules.__file__:
            return False
        frame = frame.f_back
    return True


def _line(frame: FrameType | None) -> str:
    """Return the innermost line outside torch, from `frame` on."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}" if frame else "torch.export"
