"""What a trace takes for granted of the batch's sizes, and whether a call fulfils it.

torch.export follows one branch of `if x.shape[1] > 20` and records the condition; in a call that
does not fulfil it the trace would compute something else than the model. Only what the model's own
code asks counts: torch's operators look at sizes anew whenever they run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from stagewise.errors import BatchError

Size: TypeAlias = "int | sympy.Expr"  # an expression of symbols where it may change

_TORCH = Path(torch.__file__).parent
_REMEDY = (
    "pass such a batch (padded, if need be), or capture the model with an example of these sizes: "
    "stagewise.capture(model, ...)"
)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What forward decided at `place` (file and line), as a relation of symbolic sizes."""

    holds: sympy.Basic
    place: str


@dataclass(frozen=True, kw_only=True)
class TakenInput:
    """A tensor of the batch, leaf `leaf` of argument `name`, and its form in the trace."""

    name: str
    leaf: int
    shape: tuple[Size, ...]
    dtype: torch.dtype

    def of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The tensor of this call."""
        if self.name not in inputs:
            raise BatchError(
                f"the model was captured with {self.name!r}, but it is not given; pass it, or "
                "capture the model without it (stagewise.capture(model, example))"
            )
        value = inputs[self.name]
        if isinstance(value, torch.Tensor):
            return value
        return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)][self.leaf]

    def __str__(self) -> str:
        sizes = [str(s) if isinstance(s, int) else "2 or more" for s in self.shape]
        if sizes and not isinstance(self.shape[0], int):
            sizes[0] = "any"  # the number of samples
        return f"({', '.join(sizes)}) and {self.dtype}"


def shape_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    """A traced tensor's shape."""
    sizes = [sympy.sympify(size) for size in tensor.shape]  # a SymInt gives its expression
    return tuple(int(size) if size.is_number else size for size in sizes)


def conditions_of(graph: fx.Graph) -> tuple[Condition, ...]:
    """The conditions that the model's code set on symbolic sizes in the trace `graph`."""
    values = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    modes = (getattr(value, "fake_mode", None) for value in values)
    shapes = next((mode.shape_env for mode in modes if mode and mode.shape_env), None)
    if shapes is None:
        return ()
    found = {}
    for guard in shapes.guards:
        frame, holds = guard.sloc.framework_loc, shapes.replace(guard.expr)
        if holds is not sympy.true and frame is not None and _is_models(Path(frame.filename)):
            place = f"{frame.filename}, line {frame.lineno}"
            found[holds, place] = Condition(holds=holds, place=place)
    return tuple(found.values())


def check(
    forms: Sequence[TakenInput],
    tensors: Sequence[torch.Tensor],
    conditions: Sequence[Condition],
    *,
    samples: bool = True,
) -> None:
    """Raise BatchError unless `tensors` have these forms and fulfil the conditions.

    Without `samples` nothing is said of their number. Any other size that may change must be at
    least 2: torch.export takes this for granted, since a size of 1 would mean broadcasting.
    """
    known: dict[Any, sympy.Integer] = {}
    names: dict[Any, sympy.Symbol] = {}
    for form, tensor in zip(forms, tensors, strict=True):
        sizes = list(enumerate(zip(form.shape, tensor.shape, strict=False)))[not samples :]
        fits = len(tensor.shape) == len(form.shape) and all(
            wanted == size if isinstance(wanted, int) else size > 1 or axis == 0
            for axis, (wanted, size) in sizes
        )
        if not fits or tensor.dtype != form.dtype:
            raise BatchError(
                f"{form.name!r} has shape {tuple(tensor.shape)} and {tensor.dtype}, but the model "
                f"was captured for {form}; {_REMEDY}"
            )
        for axis, (wanted, size) in sizes:
            name = sympy.Symbol(f"{form.name}.shape[{axis}]", integer=True)
            if isinstance(wanted, sympy.Symbol):
                names.setdefault(wanted, name)
                known.setdefault(wanted, sympy.Integer(size))
            if not isinstance(wanted, int) and wanted.free_symbols <= known.keys():
                expected = int(wanted.xreplace(known))
                if expected != size:
                    raise BatchError(
                        f"{name} is {size}, but the model was captured with an example where it is "
                        f"{_text(wanted.xreplace(names))}, which is {expected} here; {_REMEDY}"
                    )
    for condition in conditions:
        symbols = condition.holds.free_symbols
        if symbols <= known.keys() and condition.holds.xreplace(known) == sympy.false:
            values = ", ".join(sorted(f"{names[symbol]} is {known[symbol]}" for symbol in symbols))
            raise BatchError(
                f"{values}, but the model was captured with an example where "
                f"{_text(condition.holds.xreplace(names))}, on which {condition.place} depends; "
                f"{_REMEDY}; or let forward decide nothing by sizes"
            )


def _is_models(file: Path) -> bool:
    """Whether this file of code belongs to a model: torch.nn counts, its operators do not."""
    return not file.is_relative_to(_TORCH) or file.is_relative_to(_TORCH / "nn")


def _text(expression: sympy.Basic) -> str:
    return str(PythonPrinter().doprint(expression))


def is_symbolic(size: object) -> bool:
    """Whether a size may differ from batch to batch."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number
