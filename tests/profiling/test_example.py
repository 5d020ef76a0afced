"""A model is measured where its pipeline will run, and stands where it stood afterwards."""

import pytest
import torch
from torch import nn

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
        return self


def test_cells_are_moved_to_be_measured_and_put_back() -> None:
    cell = Moving(2, 2)
    with example._moved(chain_of(nn.Sequential(cell)), torch.device("xpu", 1)):
        assert cell.moves == ["xpu:1"]
    assert cell.moves == ["xpu:1", "cpu"]
    with example._moved(chain_of(nn.Sequential(cell)), torch.device("cpu")):
        assert cell.moves == ["xpu:1", "cpu"]
