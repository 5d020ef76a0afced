"""Randomness as a function: what a cell draws depends only on (seed, step, cell, microbatch).

Otherwise dropout would depend on what each process ran before. So the device's default generator is
seeded before every cell; a recomputation seeds it again and draws the same masks, and a run is the
same at any number of stages. The caller's generator state is restored afterwards.
`Generator.manual_seed` costs about a microsecond, `torch.manual_seed` seventy.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from stagewise.engine.stage.draws import Draws
from stagewise.errors import CellError
from stagewise.model.cell import Chain

_MASK = (1 << 64) - 1
_INITIALISATION = -1  # as a step index, before all others
LOSS_CELL = (1 << 32) - 1  # as a cell index, for the loss, whatever the chain's length


def derive_seed(seed: int, step: int, cell: int, microbatch: int) -> int:
    """Mix four numbers into a 64-bit seed (SplitMix64's finaliser, Steele et al., OOPSLA 2014)."""
    return _mixed(_mixed(_mixed(_mixed(0, seed), step), cell), microbatch)


def _mixed(state: int, number: int) -> int:
    state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that dropout and the like draw from on `device`.

    The CPU's if that of the device is unknown; then recomputed outputs are compared all the same.
    """
    if device.type in ("cpu", "meta"):
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = torch.get_device_module(device)
    if not hasattr(module, "default_generators"):
        return torch.default_generator
    index = module.current_device() if device.index is None else device.index
    generator: torch.Generator = module.default_generators[index]
    return generator


def seed_initialisation(seed: int, cell_name: str) -> None:
    """Seed the CPU's generator for a cell's initial values.

    By its name, so that they are the same when only a part of the chain is built.
    """
    digest = hashlib.blake2b(cell_name.encode(), digest_size=8).digest()
    name = int.from_bytes(digest, "big")
    torch.default_generator.manual_seed(derive_seed(seed, _INITIALISATION, name, 0))


class CellRandomness:
    """Seeds the generators that cells of one device draw from, before each cell of one step.

    These are the device's default generator, the CPU's (which any cell may use), and those found
    by `draws`. Microbatches are counted over all data ranks: the `first` here has that number.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        device: torch.device,
        draws: Draws | None = None,
        first: int = 0,
    ) -> None:
        self._first = first
        self._step = _mixed(_mixed(0, seed), step)
        self._cells: dict[int, int] = {}  # the state after mixing in the cell, by cell
        self._generator, self.draws = default_generator(device), draws
        self._has_other = self._generator is not torch.default_generator

    def enter_cell(self, cell: int, microbatch: int) -> None:
        """Call right before cell `cell` runs on `microbatch`."""
        state = self._cells.get(cell)
        if state is None:
            state = self._cells[cell] = _mixed(self._step, cell)
        number = _mixed(state, microbatch + self._first)
        self._generator.manual_seed(number)
        if self._has_other:
            torch.default_generator.manual_seed(number)
        if self.draws is not None and self.draws.active:
            self.draws.enter(number)

    def enter_loss(self, microbatch: int) -> None:
        """Call right before the loss function runs on `microbatch`."""
        self.enter_cell(LOSS_CELL, microbatch)

    def check_recomputed(self, stage: int, cells: Chain, microbatch: int) -> None:
        """Raise CellError for a recomputation that differs from its forward.

        Unless a source of random numbers was found late: the call warns of it at its end.
        """
        if self.draws is None or not self.draws.late():
            names = [cell.name for cell in cells]
            raise CellError(
                f"stage {stage} computed something else when it recomputed microbatch "
                f"{microbatch}, so its gradients would be wrong: one of the cells "
                f"{', '.join(names)} draws from a generator that it creates itself, advances an "
                "iterator, counts its calls or reads the clock; draw from torch's default "
                "generator, pass in what changes, or plan with recompute='never'"
            )


def randomness_on(
    devices: Iterable[torch.device], seed: int, step: int, draws: Draws, first: int
) -> dict[torch.device, CellRandomness]:
    """Return that of one step, by device."""
    return {device: CellRandomness(seed, step, device, draws, first) for device in devices}


@contextmanager
def generators_moved(devices: Iterable[torch.device]) -> Iterator[list[torch.device]]:
    """Yield a list that at the end holds the devices (or CPU) whose default generator was used."""
    moved: list[torch.device] = []
    every = {torch.device("cpu"), *devices}
    before = {device: default_generator(device).get_state() for device in every}
    try:
        yield moved
    finally:
        for device, state in before.items():
            if not torch.equal(state, default_generator(device).get_state()):
                moved.append(device)


@contextmanager
def generators_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restore the default generators' states at the end, including the CPU's."""
    generators = [default_generator(d) for d in {torch.device("cpu"), *devices}]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
