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


def _device_here() -> torch.device:
    """Return the current accelerator, whose generator a recipe's own code may use, else the CPU."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    is_there = getattr(torch.get_device_module(kind), "is_initialized", lambda: True)
    if not is_there():  # nothing has drawn from it
        return torch.device("cpu")
    return torch.device(kind.type, torch.accelerator.current_device_index())


def seed_everything(seed: int) -> None:
    """Seed the generators that a recipe may use: torch, Python's random, NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_states(device: torch.device | None = None) -> dict[str, Any]:
    """Return the states of all generators, that of `device` (default: the accelerator) too.

    Python's 625 words are a tensor: a checkpoint would write, and check, each by itself.
    """
    version, words, gauss = random.getstate()
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "device": default_generator(device or _device_here()).get_state(),
    }


def restore_random_states(states: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Restore what `random_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(map(int, words)), gauss))  # older checkpoints have integers
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    generator = default_generator(device or _device_here())
    if generator is not torch.default_generator:
        generator.set_state(states["device"])


@contextmanager
def random_states_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore the generators' states at the end."""
    states = random_states(device)
    try:
        yield
    finally:
        restore_random_states(states, device)
