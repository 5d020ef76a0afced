import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from stagewise.batch.values import move, put_together, take_apart
from stagewise.errors import CellError


class Point(NamedTuple):
    x: Tensor
    y: object


@dataclass(frozen=True)
class Inner:
    values: list[Tensor]
    scale: float = 1.0


@dataclass
class Outer:
    inner: Inner | None
    point: Point


@dataclass(frozen=True)
class Config:
    """A dataclass without tensors stays a constant."""

    width: int


class Opaque:
    def __init__(self) -> None:
        self.hidden = {"tensor": torch.ones(1)}


def leaves() -> st.SearchStrategy[object]:
    return st.one_of(
        st.integers(0, 5).map(lambda n: torch.full((n,), float(n))),
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(max_size=3),
        st.integers().map(Config),
    )


def values() -> st.SearchStrategy[object]:
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=2), inner, max_size=3),
            st.builds(Point, st.just(torch.ones(2)), inner),
            st.builds(Outer, st.none(), st.builds(Point, st.just(torch.zeros(1)), inner)),
        ),
        max_leaves=8,
    )


def equal(a: object, b: object) -> bool:
    ours, first = take_apart(a)
    theirs, second = take_apart(b)
    return first == second and len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@hypothesis.given(values())
def test_round_trip_also_through_pickle(value: object) -> None:
    tensors, structure = take_apart(value)
    assert equal(put_together(tensors, structure), value)
    travelled = pickle.loads(pickle.dumps(structure))
    assert travelled == structure
    assert equal(put_together(tensors, travelled), value)


def test_tensors_come_in_order_and_each_once() -> None:
    a, b = torch.ones(1), torch.ones(1)
    tensors, structure = take_apart({"x": a, "y": (b, a), "z": [None, a]})
    assert len(tensors) == 2 and tensors[0] is a and tensors[1] is b
    rebuilt = put_together([torch.zeros(1), torch.zeros(2)], structure)
    assert isinstance(rebuilt, dict)
    assert rebuilt["x"] is rebuilt["y"][1] is rebuilt["z"][1]
    assert rebuilt["y"][0].shape == (2,) and rebuilt["z"][0] is None


def test_equal_tensors_are_not_one_tensor() -> None:
    assert take_apart((torch.ones(1), torch.ones(1)))[1] != take_apart((torch.ones(1),) * 2)[1]


def test_dataclasses_keep_their_class() -> None:
    value = Outer(Inner([torch.ones(2), torch.ones(3)], 0.5), Point(torch.ones(1), "y"))
    tensors, structure = take_apart(value)
    assert [t.numel() for t in tensors] == [2, 3, 1]
    rebuilt = put_together(tensors, pickle.loads(pickle.dumps(structure)))
    assert isinstance(rebuilt, Outer) and isinstance(rebuilt.inner, Inner)
    assert rebuilt.inner.scale == 0.5 and rebuilt.point.y == "y"
    assert take_apart([Config(3)]) == ([], take_apart([Config(3)])[1])


def test_structures_tell_constants_and_kinds_apart() -> None:
    x = torch.ones(1)
    kinds = [
        (x,),
        [x],
        {"a": x},
        {"b": x},
        OrderedDict(a=x),
        (x, None),
        (x, 1),
        (x, 2),
        Point(x, 1),
    ]
    structures = [take_apart(kind)[1] for kind in kinds]
    for index, structure in enumerate(structures):
        assert structures.index(structure) == index


def test_an_object_that_hides_tensors_is_refused() -> None:
    with pytest.raises(CellError, match="a Opaque hides tensors from the pipeline; use a tuple"):
        take_apart((torch.ones(1), Opaque()))


def test_move_keeps_what_is_there_and_what_is_one() -> None:
    x = torch.ones(1)
    moved = move({"a": x, "b": x, "c": 3}, torch.device("cpu"))
    assert isinstance(moved, dict) and moved["a"] is x is moved["b"]
    away = move([x, x], torch.device("meta"))
    assert isinstance(away, list) and away[0] is away[1] and away[0].is_meta
