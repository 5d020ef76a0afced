"""Copies in memory are exact, and the step to go on from is one that all still have."""

from collections.abc import Callable, Sequence

import pytest
import torch

from stagewise.errors import PeerError
from stagewise.training.workers import neighbour
from stagewise.training.workers.neighbour import NeighbourCopies


def test_a_copy_is_exact_and_its_own() -> None:
    tensors = [
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.empty(0, 4),
        torch.nn.Parameter(torch.ones(2, requires_grad=True)),
    ]
    packed = neighbour._Packed()
    for step, shared in enumerate(({"lr": 0.1, "of": "one"}, ("another", None))):
        packed.fill(step, (tensors, shared))
        again, value = packed.value()
        assert value == shared and packed.step == step
        for one, other in zip(again, tensors, strict=True):
            assert one.tolist() == other.tolist()
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
    again[1].zero_()
    assert packed.value()[0][1].equal(tensors[1])


Steps = tuple[set[int], set[int], object]


@pytest.mark.parametrize(
    ("others", "step"),
    [
        ([({4, 5}, {4, 5}, "b"), ({4, 5}, {4, 5}, "c")], 5),
        ([({4, 5}, {4}, "b"), ({4, 5}, {4, 5}, "c")], 5),  # nobody has lost what was not copied
        ([({4, 5}, {4, 5}, "b"), (set(), set(), None)], 4),  # whose copy rank 0 has of step 4 only
        ([({3, 4}, {3, 4}, "b"), ({4, 5}, {4, 5}, "c")], 4),  # one is a step behind
    ],
)
def test_the_step_is_the_last_that_all_have(
    monkeypatch: pytest.MonkeyPatch, others: Sequence[Steps], step: int
) -> None:
    copies = three_ranks(monkeypatch, lambda own: [own, *others])
    value, told = copies.regained("a")
    assert value == f"after {step}" and told == ["a", *(told for _, _, told in others)]


def test_a_rank_lost_with_its_copy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Steps = (set(), set(), None)
    copies = three_ranks(monkeypatch, lambda own: [own, nothing, nothing])
    with pytest.raises(PeerError, match=r"ranks \[1, 2\] were lost, .* continue .* --resume"):
        copies.regained("a")


def three_ranks(
    monkeypatch: pytest.MonkeyPatch, everyone: Callable[[Steps], list[Steps]]
) -> NeighbourCopies:
    """Those of rank 0 after steps 4 and 5; of its neighbour it has step 4 only."""
    copies = NeighbourCopies()
    for step in (4, 5):
        copies._own[step % 2].fill(step, f"after {step}")
    copies._held[0].fill(4, "the neighbour's")
    monkeypatch.setattr(neighbour, "num_processes", lambda: 3)
    monkeypatch.setattr(neighbour, "own_rank", lambda: 0)
    monkeypatch.setattr(neighbour, "values_of_all", lambda own, what: everyone(own))
    monkeypatch.setattr(neighbour._Packed, "sent", lambda packed, rank: [])
    return copies
