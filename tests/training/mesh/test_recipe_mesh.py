"""A mesh that a recipe has no use for is refused before anything starts."""

from pathlib import Path

import pytest

from stagewise.errors import UsageError
from stagewise.mesh import MeshShape
from tests.training.mesh.test_data_parts import recipe_with

OWN = "def parallelize(module, mesh, stage_index):\n    pass"


@pytest.mark.parametrize(
    "mesh, line, told",
    [
        ("pp=2,x=2", "", "has an axis 'x', along which batches may be divided or not"),
        ("pp=2,tp=2", "", "has an axis 'tp', but nothing in .* uses it; define parallelize"),
        ("dp_shard=2,fsdp=2", "", "several axes to shard parameters over, dp_shard, fsdp"),
        ("dp_shard=2", "accumulate_in_float32 = True", "has accumulate_in_float32 = True, but"),
        ("x=2", "data_axes = {'x': -1}", "data_axes in .* is {'x': -1}; it must be a dict from"),
        ("x=2", "data_axes = ['x']", r"data_axes in .* is \['x'\]; it must be a dict from axes"),
        ("x=2", "parallelize = 3", "parallelize in .* is a int; it must be a function"),
    ],
)
def test_refused(tmp_path: Path, mesh: str, line: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        recipe_with(tmp_path, line).check(MeshShape.of(mesh))


@pytest.mark.parametrize(
    "mesh, line",
    [
        ("pp=2,dp_shard=2,tp=1", ""),
        ("pp=2,tp=2", OWN),
        ("x=2", "data_axes = {'x': 0}"),
        ("dp_shard=2,fsdp=2,tp=2", OWN),
    ],
)
def test_taken(tmp_path: Path, mesh: str, line: str) -> None:
    recipe_with(tmp_path, line).check(MeshShape.of(mesh))
