"""What a mesh costs and saves, in numbers worked out by hand; and which one is chosen."""

import pytest

from stagewise.costs import CellCost, LinkCost
from stagewise.errors import PlanError
from stagewise.mesh import MeshShape
from stagewise.planning import Plan
from stagewise.planning.alternatives import Room
from stagewise.planning.meshes.mesh_cost import MeshCost
from stagewise.planning.meshes.mesh_search import mesh_shapes, search_meshes

BYTE_SECONDS = 1e-9


def cost(mesh: str, memory: int = 10**6) -> MeshCost:
    """Two cells of 3000 and 1000 bytes, forward 1 s, backward 2 s; a slow link beyond 4 ranks."""
    shape = MeshShape.of(mesh)
    cells = tuple(
        CellCost(name=name, forward_seconds=1, backward_seconds=2, parameter_bytes=size)
        for name, size in (("a", 3000), ("b", 1000))
    )
    balance = (1, 1) if shape.num_devices == 2 else (2,)
    if shape.num_devices > 2:
        raise PlanError("only two cells")

    def link(span: int) -> LinkCost:
        return LinkCost(seconds_per_byte=BYTE_SECONDS if span <= 4 else 10 * BYTE_SECONDS)

    return MeshCost(
        shape=shape,
        plan=Plan(balance=balance, num_microbatches=1, cells=cells),
        room=Room(device="test", memory_bytes=memory, state_factor=4.0),
        link_over=link,
    )


def test_sharding_divides_what_is_kept_but_not_what_a_step_needs() -> None:
    sharded, whole = cost("pp=2,dp_shard=2"), cost("pp=2,dp=2")
    assert whole.kept_bytes == (12000, 4000) == whole.device_bytes
    assert sharded.kept_bytes == (6000, 2000)  # of 16000 in all, a quarter or less
    assert sharded.device_bytes == (6000 + 2 * 3000, 2000 + 2 * 1000)
    assert cost("pp=2,dp_shard=8").device_bytes == (1500 + 6000, 500 + 2000)
    assert "saves up to 4.39 KiB in a step" in str(cost("pp=2,dp_shard=8"))
    assert "1/2 of its stages" in str(sharded)


def test_exchanges_are_rings_on_the_links_that_they_span() -> None:
    """Of 3000 bytes: each rank of n passes n - 1 parts on, twice."""
    assert cost("pp=2,dp_shard=2").exchange_seconds == pytest.approx(2 * 1500 * BYTE_SECONDS)
    assert cost("pp=2,dp=4").exchange_seconds == pytest.approx(6 * 750 * BYTE_SECONDS)
    both = cost("pp=2,dp_replicate=4,dp_shard=2")  # replicas are beyond the fast links
    assert both.exchange_seconds == pytest.approx((2 * 1500 + 6 * 375 * 10) * BYTE_SECONDS)
    assert both.step_seconds == both.plan.timeline.duration_seconds + both.exchange_seconds
    assert cost("pp=2").exchange_seconds == 0
    with pytest.raises(PlanError, match="has tp among its axes, whose costs depend on"):
        cost("pp=2,tp=2")


def test_all_shapes_of_a_number_of_devices() -> None:
    assert [*map(str, mesh_shapes(4))] == [
        "pp=4",
        "pp=2,dp_replicate=2",
        "pp=2,dp_shard=2",
        "pp=1,dp_replicate=4",
        "pp=1,dp_replicate=2,dp_shard=2",
        "pp=1,dp_shard=4",
    ]
    assert all(shape.num_ranks == 24 for shape in mesh_shapes(24))


def test_the_fastest_that_fits_is_chosen() -> None:
    free = search_meshes(4, lambda shape: cost(str(shape)))
    every = [free.chosen, *free.others]
    fastest = min(each.step_seconds for each in every)
    assert free.chosen.step_seconds == pytest.approx(fastest, rel=1e-9)  # of equal ones, the first
    assert [(str(shape), why) for shape, why in free.rejected] == [("pp=4", "only two cells")]
    assert "not pp=4: only two cells" in str(free)
    tight = search_meshes(4, lambda shape: cost(str(shape), 12_000))
    assert str(tight.chosen.shape) == "pp=2,dp_replicate=2" and tight.chosen.fits
    assert "too much" in str(tight)
    with pytest.raises(PlanError, match=r"no mesh of 4 devices fits: pp=2,dp_replicate=2 needs"):
        search_meshes(4, lambda shape: cost(str(shape), 1000))
