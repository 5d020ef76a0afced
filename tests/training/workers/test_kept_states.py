"""Copies in memory are exact, outlive the rank, and all ranks go on from a step that they share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stagewise.errors import PeerError
from stagewise.training.workers import kept_states
from stagewise.training.workers.kept_states import KeptStates, memory_for


def test_a_copy_is_exact_and_its_own(tmp_path: Path) -> None:
    tensors = [
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.empty(0, 4),
        torch.nn.Parameter(torch.ones(2, requires_grad=True)),
    ]
    slot = kept_states._Slot(str(tmp_path / "slot"))
    for step, shared in enumerate(({"lr": 0.1, "of": "one"}, ("another", "x" * 5000))):
        slot.fill(step, (tensors, shared))
        again, value = kept_states._Slot(str(tmp_path / "slot")).value()
        assert value == shared and slot.step == step
        for one, other in zip(again, tensors, strict=True):
            assert one.tolist() == other.tolist()
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
    again[1].zero_()
    assert slot.value()[0][1].equal(tensors[1])


def test_a_worker_in_a_lost_ones_place_finds_its_state(tmp_path: Path) -> None:
    """Also if the lost one was killed while it copied, and whatever the sizes have become."""
    with memory_for(2, tmp_path) as paths:
        lost, other = KeptStates(paths, 1), KeptStates(paths, 0)
        for step in range(3):
            lost.keep(step, {"weight": torch.full((10**step,), 1.0 * step)})
            other.keep(step, "of rank 0")
        with pytest.raises(TypeError, match="pickle"):  # it ends in the middle of step 3's
            lost.keep(3, (torch.ones(5), (each for each in "not to be copied")))
        new = KeptStates(paths, 1)
        assert new.regained("")[0]["weight"].tolist() == [2.0] * 100
        assert other.regained("")[0] == "of rank 0"
        lost.clear()
        with pytest.raises(PeerError, match=r"ranks \[0\] were lost before .* --resume"):
            new.regained("")
    assert not [*tmp_path.iterdir()]


Told = tuple[set[int], object]


@pytest.mark.parametrize(
    ("others", "step"),
    [
        ([({4, 5}, "b"), ({4, 5}, "c")], 5),
        ([({3, 4}, "b"), ({4, 5}, "c")], 4),  # one is a step behind
        ([({4}, "b"), ({4, 5}, "c")], 4),  # and was killed while it copied step 5
    ],
)
def test_the_step_is_the_last_that_all_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: Sequence[Told], step: int
) -> None:
    def everyone(own: Any, what: str) -> list[Told]:
        return [own, *others]

    monkeypatch.setattr(kept_states, "values_of_all", everyone)
    with memory_for(1, tmp_path) as paths:
        states = KeptStates(paths, 0)
        for each in (4, 5):
            states.keep(each, f"after {each}")
        value, told = states.regained("a")
        assert value == f"after {step}" and told == ["a", *(told for _, told in others)]
        left = {slot.step for slot in states._slots} - {-1}
        assert max(left) == step, "what came after it is not gone on from, now or later"
