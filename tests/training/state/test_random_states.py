"""What a recipe's own code draws between steps goes on from where it was."""

import random

import numpy as np
import pytest
import torch

from stagewise.training.state import random_states

STATES = "stagewise.training.state.random_states"


def draws(generator: torch.Generator) -> list[float]:
    """One from each generator, the accelerator's too."""
    own = torch.rand((), generator=generator)
    return [random.random(), np.random.rand(), float(torch.rand(())), float(own)]


def test_the_accelerators_generator_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second generator of the CPU stands for it, on a device that is asked for by nobody."""
    generator = torch.Generator()
    asked: list[torch.device] = []

    def of(device: torch.device) -> torch.Generator:
        asked.append(device)
        return generator

    monkeypatch.setattr(f"{STATES}._device_here", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(f"{STATES}.default_generator", of)
    with random_states.random_states_kept():
        first = draws(generator)
    assert draws(generator) == first
    assert set(asked) == {torch.device("cuda", 3)}


def test_without_an_accelerator_it_is_the_cpus() -> None:
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        pytest.skip("an accelerator is here, whose generator is kept besides")
    with random_states.random_states_kept():
        first = draws(torch.default_generator)
    assert draws(torch.default_generator) == first
