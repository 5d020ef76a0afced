"""Exact partition for any placement: a mixed-integer program, solved by branch and bound.

Problem: if devices hold several stages, their loads are sums over the whole chain, and no dynamic
program over prefixes is exact. Idea: a cut selects one boundary per stage; seconds and bytes are
linear in these choices, and the order of the stages is one row per boundary:

    x[s, i] = 1 if stage s begins with cell i;  sum_i x[s, i] = 1
    sum_{j <= i} x[s + 1, j] <= sum_{j < i} x[s, j]
    seconds of device d = sum of its stages' (ends - starts) <= z;  minimise z

HiGHS (Huangfu and Hall, 2018; through scipy.optimize.milp) solves it and reports the bound that it
has proven. Numbers are scaled, because its tolerances are absolute.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from stagewise.planning.partition.cut_costs import Array, Layout

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

_SCALE = 1000.0  # the incumbent's seconds in the program's unit


def branch_and_bound(
    layout: Layout, better_than: float, max_nodes: int
) -> tuple[tuple[int, ...] | None, float]:
    """Return (cuts, proven lower bound); cuts are None if none were found below `better_than`."""
    from scipy.optimize import Bounds, milp

    if not np.isfinite(better_than):
        better_than = float(layout.cell_seconds.sum() + 2 * layout.transfers.sum()) or 1.0
    scale = _SCALE / better_than if better_than else 1.0
    rows = _constraints(layout, scale)
    lower, upper = _limits(layout, scale)
    objective = np.zeros(len(upper))
    objective[-1] = 1
    with _quiet_stdout():
        solved = milp(
            objective,
            integrality=np.r_[np.ones(len(upper) - 1), 0],
            bounds=Bounds(lower, upper),
            constraints=rows.constraint(len(upper)),
            options={"node_limit": max_nodes, "mip_rel_gap": 0},
        )
    bound = layout.least_seconds
    if solved.mip_dual_bound is not None and np.isfinite(solved.mip_dual_bound):
        bound = max(bound, float(solved.mip_dual_bound) / scale)
    if solved.status == 2:  # infeasible: no cut is as fast as `better_than`
        return None, better_than
    if solved.x is None:
        return None, bound
    chosen = solved.x[:-1].reshape(layout.num_stages + 1, layout.num_cells + 1)
    return tuple(int(at) for at in chosen.argmax(axis=1)), bound


class _Rows:
    """The constraints of a linear program, row by row: low <= values @ columns <= high."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, entries: Iterable[tuple[int, float]], low: float, high: float) -> None:
        for column, value in entries:
            self._rows.append(len(self._low))
            self._columns.append(column)
            self._values.append(value)
        self._low.append(low)
        self._high.append(high)

    def constraint(self, num_columns: int) -> "LinearConstraint":
        from scipy.optimize import LinearConstraint
        from scipy.sparse import coo_matrix

        places = (self._rows, self._columns)
        matrix = coo_matrix((self._values, places), shape=(len(self._low), num_columns))
        return LinearConstraint(matrix.tocsc(), np.array(self._low), np.array(self._high))


def _constraints(layout: Layout, scale: float) -> _Rows:
    """Return the rows over all x[s, i] and z; stage `num_stages` ends the chain."""
    num_stages, width, rows = layout.num_stages, layout.num_cells + 1, _Rows()
    for s in range(num_stages + 1):
        rows.add([(s * width + i, 1.0) for i in range(width)], 1, 1)
    for s in range(num_stages):
        for i in range(width):
            here = [(s * width + j, -1.0) for j in range(i)]
            rows.add([((s + 1) * width + j, 1.0) for j in range(i + 1)] + here, -np.inf, 0)
    for own in layout.devices:
        load = _sums(layout.starts, layout.ends, own)
        rows.add([*_entries(load * scale), ((num_stages + 1) * width, -1.0)], -np.inf, 0)
        if layout.capped:
            need = _sums(layout.start_bytes, layout.end_bytes, own)
            most = layout.memory_bytes
            rows.add(_entries(need / max(most, 1.0)), -np.inf, most / max(most, 1.0))
    return rows


def _limits(layout: Layout, scale: float) -> tuple[Array, Array]:
    """Return the lower and upper bounds of all x[s, i] and z."""
    num_stages, num_cells = layout.num_stages, layout.num_cells
    upper = np.ones((num_stages + 1, num_cells + 1))
    for s, choices in enumerate(upper):  # 0 where stage s cannot begin
        choices[: s if s < num_stages else num_cells] = 0
        choices[num_cells - (num_stages - s) + 1 :] = 0
        if not s:
            choices[1:] = 0
    lower = np.zeros(upper.size + 1)
    lower[-1] = min(layout.least_seconds * scale, _SCALE)
    return lower, np.append(upper.ravel(), _SCALE)


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Silence HiGHS, which writes some messages directly to file descriptor 1."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    with suppress(AttributeError, ValueError):
        sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        with suppress(OSError, TypeError, AttributeError):  # the C library cannot be loaded
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _sums(starts: Array, ends: Array, own: Array) -> Array:
    """Return what each choice adds to a device that holds the stages `own`."""
    coefficients = np.zeros((len(own) + 1, starts.shape[1]))
    coefficients[:-1] -= own[:, None] * starts
    coefficients[1:] += own[:, None] * ends
    return coefficients.ravel()


def _entries(coefficients: Array) -> list[tuple[int, float]]:
    return [(int(at), float(coefficients[at])) for at in np.flatnonzero(coefficients)]
