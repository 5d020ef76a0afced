"""The generators that a process draws from between steps: Python's, NumPy's, torch's.

Cells and losses draw by (seed, step, cell, microbatch); a recipe's data, an optimizer's hooks and
metrics draw from these, so a resumed run has to continue them.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from stagewise.engine.stage.randomness import default_generator

_CPU = torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed the generators that a recipe may use: torch, Python's random, NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_states(device: torch.device = _CPU) -> dict[str, Any]:
    """Return the states of all generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "device": default_generator(device).get_state(),
    }


def restore_random_states(states: Mapping[str, Any], device: torch.device = _CPU) -> None:
    """Restore what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    generator = default_generator(device)
    if generator is not torch.default_generator:
        generator.set_state(states["device"])


@contextmanager
def random_states_kept(device: torch.device = _CPU) -> Iterator[None]:
    """Restore the generators' states at the end."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)
