"""`--mesh`, `--pipeline`, `--shard`, `--tensor`: which mesh they ask for, or why none."""

from pathlib import Path

import pytest

from stagewise.cli.train.train_options import AskedMesh
from stagewise.errors import UsageError
from tests.recipes import RunHere, write_recipe


@pytest.mark.parametrize(
    "asked, num_devices, shape",
    [
        (AskedMesh(), 2, None),
        (AskedMesh(num_ranks=4), 2, None),
        (AskedMesh(shard=1, pipeline=1), 1, None),
        (AskedMesh(shard=2), 2, "pp=2,dp_shard=2"),
        (AskedMesh(shard=2, tensor=2, num_ranks=8), 2, "pp=2,dp_shard=2,tp=2"),
        (AskedMesh(pipeline=2, shard=2, tensor=1, num_ranks=4), 2, "pp=2,dp_shard=2,tp=1"),
        (AskedMesh(mesh="dp_shard=4"), 1, "pp=1,dp_shard=4"),
        (AskedMesh(mesh="dp=2, pp=3", num_ranks=6), 3, "dp=2,pp=3"),
    ],
)
def test_the_mesh_that_is_asked_for(asked: AskedMesh, num_devices: int, shape: str | None) -> None:
    found = asked.shape(num_devices)
    assert (None if found is None else str(found)) == shape


@pytest.mark.parametrize(
    "asked, num_devices, told",
    [
        (AskedMesh(mesh="pp"), 1, "has 'pp', which is no axis with its length"),
        (AskedMesh(mesh="pp=0"), 1, "has 'pp=0', which is no axis with its length"),
        (AskedMesh(mesh="pp=2,,dp=2"), 2, "has '', which is no axis with its length"),
        (AskedMesh(mesh="a b=2"), 1, "has 'a b=2', which is no axis with its length"),
        (AskedMesh(mesh="pp=99999999999"), 1, "which is no axis with its length"),
        (AskedMesh(mesh="pp=2,pp=2"), 2, "has the axis pp twice"),
        (AskedMesh(mesh="pp=2", shard=2), 2, "names all axes, but --pipeline, --shard or"),
        (AskedMesh(shard=2, num_ranks=5), 2, "5 devices cannot be divided into 2 equal parts"),
        (AskedMesh(shard=4, num_ranks=2), 2, "2 devices cannot be divided into 4 equal parts"),
        (AskedMesh(pipeline=3), 2, "has 3 devices along the pipeline, but the plan needs 2"),
        (AskedMesh(mesh="pp=2,dp=2", num_ranks=8), 2, "needs 4 devices, but there are 8: make"),
    ],
)
def test_refused(asked: AskedMesh, num_devices: int, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        asked.shape(num_devices)


def test_the_command_refuses_before_anything_starts(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    for words, told in {
        "--mesh pp=2,tp=2": "but nothing in",
        "--shard 2 --microbatches auto": "several run side by side; give a number",
        "--devices 4 --pipeline 3": "the mesh pp=3 needs 3 devices, but there are 4",
        "--stages 3 --pipeline 2": "3 stages and 2 devices disagree",
    }.items():
        code, out, err = run_here("train", recipe, *words.split())
        assert (code, out) == (2, "") and told in err
        assert not (tmp_path / "runs").exists()
