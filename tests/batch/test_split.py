from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from stagewise.batch.join import join
from stagewise.batch.split import batch_size, microbatch_sizes, split
from stagewise.batch.values import take_apart
from stagewise.errors import BatchError


@pytest.mark.parametrize(
    ("num_samples", "num_microbatches", "sizes"),
    [(10, 4, [3, 3, 2, 2]), (8, 4, [2, 2, 2, 2]), (4, 4, [1, 1, 1, 1]), (5, 1, [5])],
)
def test_sizes(num_samples: int, num_microbatches: int, sizes: list[int]) -> None:
    assert microbatch_sizes(num_samples, num_microbatches) == sizes


def test_too_few_samples() -> None:
    with pytest.raises(BatchError, match="3 samples cannot fill 4 microbatches; use a larger"):
        microbatch_sizes(3, 4)


@hypothesis.given(st.integers(1, 200), st.data())
def test_sizes_differ_by_at_most_one_and_larger_come_first(
    num_samples: int, data: st.DataObject
) -> None:
    sizes = microbatch_sizes(num_samples, data.draw(st.integers(1, num_samples)))
    assert sum(sizes) == num_samples and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= 1


@dataclass
class Batch:
    tokens: Tensor
    extra: dict[str, object]


@st.composite
def batches(draw: st.DrawFn, size: int) -> object:
    tails = st.sampled_from([(), (1,), (0,), (2, 3)])
    tensors = tails.map(lambda tail: torch.rand(size, *tail))
    leaves = st.one_of(tensors, st.none(), st.integers(), st.text(max_size=3))
    trees = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text(max_size=2), inner, max_size=3),
            st.tuples(inner, inner),
        ),
        max_leaves=6,
    )
    return {"first": draw(tensors), "rest": draw(trees)}


@hypothesis.given(st.integers(1, 12), st.data())
def test_split_and_join_round_trip(size: int, data: st.DataObject) -> None:
    batch = data.draw(batches(size))
    sizes = microbatch_sizes(size, data.draw(st.integers(1, size)))
    parts = split(batch, sizes)
    assert [batch_size(part, "part") for part in parts] == sizes
    ours, structure = take_apart(join(parts, sizes))
    theirs, wanted = take_apart(batch)
    assert structure == wanted and all(map(torch.equal, ours, theirs))


def test_parts_are_views_and_keep_identities() -> None:
    x = torch.arange(6.0)
    first, second = split({"a": x, "b": [x, None, "c"]}, [4, 2])
    assert isinstance(first, dict) and isinstance(second, dict)
    assert first["a"] is first["b"][0] and first["b"][1:] == [None, "c"]
    assert first["a"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert second["a"].tolist() == [4, 5]


def test_leaves_that_disagree_are_named_by_path() -> None:
    batch = (torch.ones(4), {"mask": [torch.ones(3)]})
    with pytest.raises(
        BatchError, match=r"inputs\[0\] has 4 samples but inputs\[1\]\['mask'\]\[0\] has 3"
    ):
        batch_size(batch, "inputs")
    with pytest.raises(BatchError, match=r"inputs\.tokens has 2 .* inputs\.extra\['n'\] has 1"):
        batch_size(Batch(torch.ones(2), {"n": torch.ones(1)}), "inputs")
    with pytest.raises(BatchError, match="target holds no tensor"):
        batch_size({"a": None}, "target")
    with pytest.raises(BatchError, match="no samples"):
        batch_size(torch.ones(0, 3), "inputs")
