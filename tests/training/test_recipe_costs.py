"""What `stagewise advise` takes from this machine."""

from types import SimpleNamespace

import pytest
import torch

from stagewise.engine.transport import processes
from stagewise.training.recipe_costs import memory_here


def test_a_device_has_the_memory_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a share of what all GPUs have, some of which a plan may leave alone."""
    sizes = [80, 48, 80, 80]
    found = [torch.device("cuda", index) for index in range(4)]
    monkeypatch.setattr(processes, "accelerators", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda gpu: SimpleNamespace(total_memory=sizes[gpu.index]),
    )
    assert memory_here(2) == 80  # the first and the third
    assert memory_here(4) == 48
    assert memory_here(8) == 24  # two on each
