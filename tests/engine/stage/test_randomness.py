import itertools
from types import SimpleNamespace

import pytest
import torch

from stagewise.engine.stage.randomness import (
    CellRandomness,
    default_generator,
    derive_seed,
    generators_kept,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("numbers", "seed"),
    [
        ((0, 0, 0, 0), 0x2130748AAAC80268),
        ((0, 0, 0, 1), 0x698DFBA9F1FC1B53),
        ((1, 2, 3, 4), 0x336C3255CBCC01FE),
        ((-1, 10**12, 7, 0), 0x1CD554D57AE1A73E),
    ],
)
def test_seeds_stay_what_they_were(numbers: tuple[int, int, int, int], seed: int) -> None:
    """A resumed run must draw what the first would have drawn, in every version."""
    assert derive_seed(*numbers) == seed


def test_seeds_are_distinct_and_64_bit() -> None:
    seeds = {derive_seed(*numbers) for numbers in itertools.product(range(10), repeat=4)}
    assert len(seeds) == 10**4
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert derive_seed(1, 2, 3, 4) != derive_seed(4, 3, 2, 1)


def test_a_cell_draws_the_same_again_whatever_ran_between() -> None:
    randomness = CellRandomness(1, 2, CPU)
    with generators_kept([CPU]):
        randomness.enter_cell(3, 4)
        first = torch.rand(5)
        randomness.enter_cell(4, 4)
        other = torch.rand(5)
        randomness.enter_loss(4)
        loss = torch.rand(5)
        randomness.enter_cell(3, 4)
        assert torch.equal(torch.rand(5), first)
    assert not torch.equal(first, other) and not torch.equal(first, loss)


def test_the_callers_generator_is_put_back_even_after_an_error() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    with pytest.raises(KeyError), generators_kept([CPU]):
        CellRandomness(0, 0, CPU).enter_cell(0, 0)
        torch.rand(100)
        raise KeyError
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "hpu"])
def test_a_device_and_the_cpu_are_seeded_for_every_cell(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A cell on a device may draw on the CPU too, as LayerDrop does."""
    own = [torch.Generator(), torch.Generator()]
    module = SimpleNamespace(default_generators=own, current_device=lambda: 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert default_generator(torch.device(kind)) is own[1]
    with generators_kept([torch.device(kind, 0)]):
        CellRandomness(1, 2, torch.device(kind, 0)).enter_cell(3, 4)
        assert own[0].initial_seed() == torch.initial_seed() == derive_seed(1, 2, 3, 4)


def test_mps_has_its_own_and_an_unknown_device_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.Generator()
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: own)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert default_generator(torch.device("mps")) is own
    assert default_generator(torch.device("mtia", 0)) is torch.default_generator
