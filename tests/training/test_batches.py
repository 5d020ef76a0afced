"""Batches come in the same order again, whoever else draws random numbers meanwhile."""

from pathlib import Path

import torch

from stagewise.training.batches import TrainingBatches
from stagewise.training.recipe import load_recipe
from tests.recipes import write_recipe


def firsts(batches: TrainingBatches, number: int) -> list[float]:
    return [float(batches.next()[0].flatten()[0]) for _ in range(number)]


def test_skipping_finds_the_position_again(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    whole = firsts(TrainingBatches(recipe, seed=0), 15)
    later = TrainingBatches(recipe, seed=0)
    later.skip(8)
    torch.manual_seed(99)
    assert firsts(later, 7) == whole[8:]


def test_the_callers_random_numbers_stay_as_they_were(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    TrainingBatches(recipe, seed=0).skip(3)
    assert torch.equal(torch.rand(1), expected)


def test_a_second_pass_shuffles_anew(tmp_path: Path) -> None:
    values = firsts(TrainingBatches(load_recipe(write_recipe(tmp_path)), seed=0), 12)
    assert len(set(values)) == 12


def test_the_first_batch_is_seen_and_then_used(tmp_path: Path) -> None:
    batches = TrainingBatches(load_recipe(write_recipe(tmp_path)), seed=0)
    assert batches.next() is batches.first
    assert batches.next() is not batches.first


def test_a_generator_is_asked_for_again(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, ("Shuffled() if", "iter(Shuffled()) if")))
    batches = TrainingBatches(recipe, seed=0)
    assert batches.num_batches is None
    assert len(firsts(batches, 13)) == 13
