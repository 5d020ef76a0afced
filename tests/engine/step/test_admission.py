"""What ranks compare before a call."""

import pytest
import torch

from stagewise.engine.step.digest import autocast_here


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
def test_autocast_is_compared_on_any_device(kind: str) -> None:
    torch.set_autocast_enabled(kind, True)
    try:
        assert autocast_here() == ((kind, torch.get_autocast_dtype(kind)),)
    finally:
        torch.set_autocast_enabled(kind, False)
