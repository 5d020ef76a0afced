"""Whether a capture takes one sample, too, where forward asks how many there are.

torch.export takes for granted that a batch has two samples or more. Where forward itself asks
whether there is one (`if x.shape[0] != y.shape[0]: y = y.expand(...)`, as in transformers' masks),
that is a condition, and would refuse a microbatch of one sample. Mostly it is about broadcasting,
and both ways come to the same; so the condition is left out, and the cells are tried on one sample.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy

from stagewise.model.export.disk_cache import Plain
from stagewise.model.export.exported_cell import Program
from stagewise.model.promised_sizes import Condition

_MANY = (2, 3, 4, 5, 7, 8, 64, 1000)


def without_asking(pieces: Sequence[Plain]) -> list[Plain] | None:
    """`pieces` that take one sample; None where no condition forbids it."""
    freed = [
        dataclasses.replace(piece, programs={m: _freed(p) for m, p in piece.programs.items()})
        for piece in pieces
    ]
    return None if freed == [*pieces] else freed


def _freed(program: Program) -> Program:
    counts = {form.shape[0] for form in program.batch if form.counts_samples}
    kept = tuple(c for c in program.conditions if not _is_about_one(c, counts))
    return dataclasses.replace(program, conditions=kept)


def _is_about_one(condition: Condition, counts: set[Any]) -> bool:
    """Whether it holds for any number of samples but one."""
    symbols = condition.holds.free_symbols
    if len(symbols) != 1 or not symbols <= counts:
        return False
    (symbol,) = symbols
    answers = [condition.holds.xreplace({symbol: sympy.Integer(n)}) for n in (1, *_MANY)]
    return answers == [sympy.false, *[sympy.true] * len(_MANY)]
