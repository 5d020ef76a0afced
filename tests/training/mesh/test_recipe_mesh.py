"""A mesh that a recipe has no use for, or no batch for, is refused before anything starts."""

from pathlib import Path

import pytest

from stagewise.errors import BatchError, UsageError
from stagewise.mesh import MeshShape
from stagewise.planning import Plan
from stagewise.planning.request import PlanRequest
from stagewise.training.prepare import check_form
from stagewise.training.recipe import load_recipe
from tests.recipes import write_recipe
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


EIGHT = PlanRequest(num_stages=2, num_microbatches=8)
FILE = Plan(balance=(5, 5), num_microbatches=8)


@pytest.mark.parametrize(
    "mesh, plan, told",
    [
        ("pp=2,dp_shard=64", FILE, "a batch of 8 samples cannot be divided over 64 data ranks; us"),
        ("pp=2,dp=2,fsdp=8", FILE, "a batch of 8 samples cannot be divided over 16 data ranks"),
        ("pp=2,dp=2", EIGHT, "gives a data rank 4 of a batch's 8 samples, too few for 8 microb"),
    ],
)
def test_a_batch_too_small_for_all_ranks_is_refused_before_they_start(
    tmp_path: Path, mesh: str, plan: PlanRequest | Plan, told: str
) -> None:
    """The first started 128 processes, of which each then said so."""
    with pytest.raises(BatchError, match=told):
        check_form(load_recipe(write_recipe(tmp_path)), plan, mesh=MeshShape.of(mesh))


@pytest.mark.parametrize("mesh, plan", [("pp=2,dp=8", FILE), ("pp=2,dp=1", EIGHT)])
def test_a_batch_that_suffices_is_taken(
    tmp_path: Path, mesh: str, plan: PlanRequest | Plan
) -> None:
    check_form(load_recipe(write_recipe(tmp_path)), plan, mesh=MeshShape.of(mesh))


def test_data_that_only_workers_can_draw_are_left_to_them(tmp_path: Path) -> None:
    ranks = "import torch.distributed\n    torch.distributed.get_rank()\n    return Shuffled() if"
    path = write_recipe(tmp_path, ("return Shuffled() if", ranks))
    check_form(load_recipe(path), FILE, mesh=MeshShape.of("pp=2,dp_shard=64"))
