"""A model is measured where its pipeline will run, and stands where it stood afterwards."""

import pytest
import torch
from torch import nn

from stagewise.errors import PlanError
from stagewise.model.chain import chain_of
from stagewise.profiling import example


def test_ranks_measure_on_the_devices_that_they_will_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = nn.Sequential(nn.Linear(2, 2)), torch.ones(4, 2)
    assert example.example_of(model, inputs, None, {}, None, None).where == torch.device("cpu")
    monkeypatch.setattr(example, "num_processes", lambda: 2)
    monkeypatch.setattr(example, "own_device", lambda: torch.device("xpu", 1))
    assert example.example_of(model, inputs, None, {}, None, None).where == torch.device("xpu", 1)
    assert example.example_of(model, inputs, None, {}, None, "cpu").where == torch.device("cpu")


class Moving(nn.Linear):
    """Notes where it is put, and stays where it is."""

    def to(self, device: torch.device) -> "Moving":  # type: ignore[override]
        self.moves = [*getattr(self, "moves", []), str(device)]
        if device.index == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self


def test_cells_are_moved_to_be_measured_and_put_back() -> None:
    cell = Moving(2, 2)
    with example._moved(chain_of(nn.Sequential(cell)), torch.device("xpu", 1)):
        assert cell.moves == ["xpu:1"]
    assert cell.moves == ["xpu:1", "cpu"]
    with example._moved(chain_of(nn.Sequential(cell)), torch.device("cpu")):
        assert cell.moves == ["xpu:1", "cpu"]


def test_a_model_that_does_not_fit_where_it_was_to_be_measured() -> None:
    first, second = Moving(2, 2), Moving(2, 2)
    chain, full = chain_of(nn.Sequential(first, second)), torch.device("xpu", 7)
    with (
        pytest.raises(PlanError, match=r"on xpu:7 .* do not fit there.*--plan"),
        example._moved(chain, full),
    ):
        pytest.fail("it was not moved")
    assert first.moves == ["xpu:7", "cpu"]
