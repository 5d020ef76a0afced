"""What a trace assumes about the batch's sizes, and whether a call satisfies it.

torch.export follows one branch of `if x.shape[1] > 20`, and bakes in the number of classes of a
one_hot; for a call that violates this the trace would differ from the model, so it is refused
before anything runs (`export/asked_sizes.py` records the assumptions).
"""

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from stagewise.errors import BatchError

Size: TypeAlias = "int | sympy.Expr"  # a symbolic expression if it is dynamic

_SAMPLES = sympy.Symbol("samples", integer=True, positive=True)  # of a microbatch

_REMEDY = (
    "pass such a batch (padded, if need be), or capture the model with an example of these sizes: "
    "stagewise.capture(model, ...)"
)
_TWO_SAMPLES = (
    "give each microbatch two samples or more: fewer microbatches (--microbatches, "
    "num_microbatches=), or a larger batch"
)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A decision of forward at `place` (file and line), as a relation of symbolic sizes."""

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
        """Return this tensor of a call."""
        if self.name not in inputs:
            raise BatchError(
                f"the model was captured with {self.name!r}, which is missing here; pass it, or "
                "capture the model without it (stagewise.capture(model, example))"
            )
        value = inputs[self.name]
        if isinstance(value, torch.Tensor):
            return value
        return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)][self.leaf]

    @property
    def counts_samples(self) -> bool:
        """Whether its first dimension is a dynamic number of samples."""
        return bool(self.shape) and isinstance(self.shape[0], sympy.Symbol)

    def __str__(self) -> str:
        sizes = [str(s) if isinstance(s, int) else "2 or more" for s in self.shape]
        if sizes and not isinstance(self.shape[0], int):
            sizes[0] = "any"  # the number of samples
        return f"({', '.join(sizes)}) and {self.dtype}"


def shape_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    """Return a traced tensor's shape."""
    sizes = [sympy.sympify(size) for size in tensor.shape]  # a SymInt becomes its expression
    return tuple(int(size) if size.is_number else size for size in sizes)


def check_promises(
    forms: Sequence[TakenInput],
    tensors: Sequence[torch.Tensor],
    conditions: Sequence[Condition],
    *,
    samples: bool = True,
) -> None:
    """Raise BatchError unless `tensors` have these forms and satisfy the conditions.

    Without `samples`, only violations for any number of samples raise. Any other dynamic size must
    be at least 2: torch.export assumes so, since a size of 1 would mean broadcasting.
    """
    known: dict[Any, sympy.Basic] = {}
    names: dict[Any, sympy.Symbol] = {}
    for form, tensor in zip(forms, tensors, strict=True):
        sizes = list(enumerate(zip(form.shape, tensor.shape, strict=False)))
        if not samples and form.counts_samples:
            known.setdefault(form.shape[0], _SAMPLES)
            names.setdefault(form.shape[0], _name(form, 0))
            del sizes[0]
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
            if isinstance(wanted, sympy.Symbol):
                names.setdefault(wanted, _name(form, axis))
                known.setdefault(wanted, sympy.Integer(size))
            if not isinstance(wanted, int) and wanted.free_symbols <= known.keys():
                expected = wanted.xreplace(known)
                if expected.is_number and int(expected) != size:
                    raise BatchError(
                        f"{_name(form, axis)} is {size}, but the model was captured with an "
                        f"example where it equals {_text(wanted.xreplace(names))}, which is "
                        f"{expected} here; {_REMEDY}"
                    )
    counts = {form.shape[0] for form in forms if form.counts_samples}
    for condition in conditions:
        _check_condition(condition, known, names, counts)


def _check_condition(
    condition: Condition,
    known: Mapping[Any, sympy.Basic],
    names: Mapping[Any, sympy.Symbol],
    counts: AbstractSet[Any],
) -> None:
    """Raise BatchError if all of its sizes are known and it cannot hold."""
    symbols = condition.holds.free_symbols
    if not symbols <= known.keys() or _may_hold(condition.holds.xreplace(known)):
        return
    values = ", ".join(sorted(f"{names[s]} is {known[s]}" for s in symbols if known[s] != _SAMPLES))
    alone = symbols <= counts and all(known[s] == 1 for s in symbols)
    raise BatchError(
        f"{values}, but the model was captured with an example where "
        f"{_text(condition.holds.xreplace(names))}, on which {condition.place} depends; "
        f"{_TWO_SAMPLES if alone else _REMEDY}; or do not branch on sizes in forward"
    )


def inputs_to_compare(
    batch: Sequence[TakenInput], conditions: Sequence[Condition]
) -> tuple[TakenInput, ...]:
    """Return the inputs needed together to decide conditions on the number of samples."""
    counts = {form.shape[0]: _SAMPLES for form in batch if form.counts_samples}
    open_ones = set[Any]()
    for condition in conditions:
        if _SAMPLES in _reduced(condition.holds.xreplace(counts)).free_symbols:
            open_ones |= condition.holds.free_symbols
    found: list[TakenInput] = []
    for form in batch:
        own = {size for size in form.shape if not isinstance(size, int)} & open_ones
        if own:
            found.append(form)
            open_ones -= own
    return tuple(found)


def _may_hold(condition: sympy.Basic) -> bool:
    """Return whether a condition holds, or may hold for some number of samples."""
    reduced = _reduced(condition)
    if reduced in (sympy.true, sympy.false):
        return reduced is sympy.true
    if reduced.free_symbols:
        return True
    # With floating-point numbers, which sympy does not simplify; torch evaluates them like this.
    return bool(eval(_text(reduced), {"math": math, "torch": torch}))


def _reduced(condition: sympy.Basic) -> sympy.Basic:
    """Simplify `n * a == n * b` to `a == b`: every tensor has the same number of samples."""
    if isinstance(condition, (sympy.Eq, sympy.Ne)) and _SAMPLES in condition.free_symbols:
        left, right = condition.args
        ratio = sympy.cancel(left / right)
        if _SAMPLES not in ratio.free_symbols:
            return condition.func(ratio, 1)
    return condition


def _name(form: TakenInput, axis: int) -> sympy.Symbol:
    return sympy.Symbol(f"{form.name}.shape[{axis}]", integer=True)


def _text(expression: sympy.Basic) -> str:
    return str(PythonPrinter().doprint(expression))


def is_symbolic(size: object) -> bool:
    """Return whether a size is dynamic."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number
