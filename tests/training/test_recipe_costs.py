"""What `stagewise advise` takes from this machine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stagewise.engine.transport import processes
from stagewise.errors import BatchError
from stagewise.planning.devices import load_devices
from stagewise.training import recipe_costs
from stagewise.training.recipe import load_recipe
from stagewise.training.recipe_costs import Estimated, facts_of, memory_here
from tests.recipes import write_recipe


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


def test_advice_does_not_choose_a_number_of_microbatches_that_a_model_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = recipe_costs.estimate_recipe

    def at_least_two(recipe: Any, device: Any, count: int) -> Estimated:
        if count > 4:  # of 8 samples, as for a model that branches on a single one
            raise BatchError("a microbatch of one sample")
        return estimate(recipe, device, count)

    monkeypatch.setattr(recipe_costs, "estimate_recipe", at_least_two)
    recipe, h100 = load_recipe(write_recipe(tmp_path)), load_devices()["h100"]
    about: dict[str, Any] = {"num_devices": 2, "device_memory_bytes": None}
    assert facts_of(recipe, h100, **about, num_microbatches=None).num_microbatches == 4
    with pytest.raises(BatchError):
        facts_of(recipe, h100, **about, num_microbatches=8)
