"""Costs with every field filled: a new field joins by its type, or what uses these fails."""

import dataclasses
from typing import TypeVar

from hypothesis import strategies as st

from stagewise.costs import CellCost, InstructionCost, LinkCost, StageCost

T = TypeVar("T")

_SECONDS, _BYTES = st.integers(0, 6), st.integers(0, 4)


def filled(kind: type[T]) -> st.SearchStrategy[T]:
    """`kind` with every field drawn; seconds and bytes are small whole numbers."""
    by_type = {
        "str": st.just("cell"),
        "float": _SECONDS,
        "int": _BYTES,
        "float | None": st.none() | _SECONDS,
        "int | None": st.none() | _BYTES,
        "InstructionCost": INSTRUCTIONS,
    }
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return st.builds(kind, **{f.name: by_type[name_of(f.type)] for f in fields})


def name_of(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


# What instructions take beyond their cells may be less than nothing.
INSTRUCTIONS = st.builds(
    InstructionCost,
    **{field.name: st.integers(-2, 3) for field in dataclasses.fields(InstructionCost)},
)
CELLS = filled(CellCost)
STAGES = filled(StageCost)
LINKS = filled(LinkCost)
