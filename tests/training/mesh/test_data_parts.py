"""Every data rank gets its part, and all parts are the batch."""

from pathlib import Path

import pytest
import torch

from stagewise import BatchDim, Microbatches
from stagewise.errors import BatchError
from stagewise.mesh import MeshShape
from stagewise.training.mesh.data_parts import WHOLE, DataParts
from stagewise.training.mesh.recipe_mesh import RecipeMesh
from stagewise.training.recipe import load_recipe
from tests.recipes import write_recipe


def recipe_with(folder: Path, line: str = "") -> RecipeMesh:
    path = write_recipe(folder)
    path.write_text(f"{path.read_text()}\n{line}\n")
    return load_recipe(path).mesh


def test_samples_are_divided_in_order(tmp_path: Path) -> None:
    shape = MeshShape.of("dp=2,pp=2,tp=2,dp_shard=2")
    x = torch.arange(10)
    every = [DataParts.of(recipe_with(tmp_path), shape, rank) for rank in range(16)]
    parts = every[0].every((x, {"same": x}))
    assert [part[0].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    for rank, part in enumerate(every):
        dp, shard = rank // 8, rank % 2
        inputs, target = part.own((x, {"same": x}))
        assert inputs.tolist() == target["same"].tolist() == parts[2 * dp + shard][0].tolist()
    assert WHOLE.own((x, x))[0] is x and WHOLE.every((x, x)) == [(x, x)]


def test_sequences_are_divided_along_their_dimension(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "data_axes = {'ring': 1, 'ulysses': 1, 'ep': 0}")
    shape = MeshShape.of("ep=2,ring=2,ulysses=2")
    x, label = torch.arange(16).view(2, 8), torch.arange(2)
    parts = DataParts.of(recipe, shape, 5)
    inputs, target = parts.own((x, {"y": x, "label": label}))
    assert inputs.tolist() == target["y"].tolist() == [[10, 11]] and target["label"].tolist() == [1]
    assert torch.cat([part[0].flatten() for part in parts.every((x, x))]).tolist() == [*range(16)]


def test_what_cannot_be_divided_is_told(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "data_axes = {'sp': 1}")
    data = DataParts.of(recipe, MeshShape.of("dp=4"), 0)
    x = torch.ones(3, 4)
    with pytest.raises(BatchError, match="3 samples cannot be divided over 4 data ranks; use"):
        data.own((x, x))
    with pytest.raises(BatchError, match=r"a batch of stagewise\.Microbatches cannot be divided"):
        data.own((Microbatches([x[:2], x[2:]]), x))
    sequences = DataParts.of(recipe, MeshShape.of("sp=3"), 0)
    with pytest.raises(BatchError, match=r"shape \(3, 4\) cannot be divided into 3 equal parts"):
        sequences.own((x, x))
    with pytest.raises(BatchError, match="with marked parts"):
        sequences.own((BatchDim(x, 1), x))
