"""Costs with every field filled: a new field joins by its type, or what uses these fails."""

import dataclasses
import random
from typing import TypeVar

from hypothesis import strategies as st

from stagewise.costs import FREE_LINK, CellCost, FarOutput, InstructionCost, LinkCost, StageCost

T = TypeVar("T")
Numbers = st.SearchStrategy[int]

_SECONDS, _BYTES = st.integers(0, 6), st.integers(0, 4)


def filled(
    kind: type[T], seconds: Numbers = _SECONDS, size: Numbers = _BYTES, **given: Numbers
) -> st.SearchStrategy[T]:
    """`kind` with every field drawn; `given` are strategies for fields by name."""
    by_type = {
        "str": st.just("cell"),
        "float": seconds,
        "int": size,
        "float | None": st.none() | seconds,
        "int | None": st.none() | size,
        "InstructionCost": INSTRUCTIONS,
        "tuple[stagewise.costs.FarOutput, ...]": st.just(()),
    }
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return st.builds(kind, **{f.name: given.get(f.name, by_type[name_of(f.type)]) for f in fields})


def name_of(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


# What instructions take beyond their cells may be less than nothing.
INSTRUCTIONS = st.builds(
    InstructionCost,
    **{field.name: st.integers(-2, 3) for field in dataclasses.fields(InstructionCost)},
)
CELLS = filled(CellCost, trainable_bytes=st.sampled_from([None, None, 0, 1]))
LINKS = filled(LinkCost)


def stage_costs_drawn(
    seconds: Numbers = _SECONDS, size: Numbers = _BYTES, **given: Numbers
) -> st.SearchStrategy[StageCost]:
    """What `W` keeps of a stage's input is part of the input, and of what `W` keeps; what a stage
    releases is a part of its output."""
    given = {"released_output_bytes": st.just(0), **given}
    return filled(StageCost, seconds, size, **given).map(
        lambda cost: dataclasses.replace(
            cost,
            released_output_bytes=min(cost.output_bytes, cost.gradient_bytes),
            deferred_input_bytes=min(
                cost.deferred_input_bytes, cost.deferred_bytes, cost.input_bytes
            ),
        )
    )


def random_costs(rng: random.Random, num_stages: int) -> list[StageCost]:
    """For equality to the last bit; a new field joins by its name."""

    def drawn(name: str) -> float:
        return rng.random() if name.endswith("_seconds") else rng.randint(0, 99)

    names = {field.name for field in dataclasses.fields(StageCost)} - {"far_outputs"}
    return [
        StageCost(**{name: drawn(name) for name in names}, far_outputs=far_drawn(rng, left))  # type: ignore[arg-type]
        for left in reversed(range(num_stages))
    ]


def far_drawn(rng: random.Random, left: int) -> tuple[FarOutput, ...]:
    """To some of the stages beyond the next one, of those that are `left`."""
    chosen = [distance for distance in range(2, left + 1) if rng.random() < 0.3]
    return tuple(FarOutput(distance, rng.randint(0, 99), rng.randint(0, 99)) for distance in chosen)


def random_link(rng: random.Random) -> LinkCost:
    """Free, or with every field filled."""
    every = {field.name: rng.random() / 10 for field in dataclasses.fields(LinkCost)}
    return rng.choice((FREE_LINK, LinkCost(**every)))
