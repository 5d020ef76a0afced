"""The simulator's gathers and the memory of sharded stages, in numbers worked out by hand."""

from dataclasses import replace

import pytest

from stagewise.costs import CellCost, LinkCost, StageCost
from stagewise.errors import ScheduleError
from stagewise.mesh import MeshShape
from stagewise.planning import Plan, simulate
from stagewise.planning.alternatives import Room
from stagewise.planning.meshes.mesh_cost import MeshCost
from stagewise.planning.meshes.sharded_stages import data_axes, sharded_costs
from stagewise.schedule import parse_schedule
from stagewise.schedule.sharded import num_gathers, with_gathers

COST = StageCost(
    forward_seconds=4,
    backward_seconds=8,
    recompute_seconds=0,
    parameter_bytes=100,
    activation_bytes=10,
    gather_seconds=3,
    reduce_seconds=2,
    gathered_bytes=100,
    gradient_sum_bytes=100,
)


def test_a_gather_runs_beside_what_its_device_does() -> None:
    """Device 0 waits 3 s for its first gather; the second is done when stage 1 is needed."""
    plain = parse_schedule("one device", "0F0 1F0 1B0 0B0")
    made = with_gathers(plain, {0: 0, 1: 1})
    spans = {str(s.instruction): s for s in simulate(made, [COST] * 2).spans}
    times = {name: (span.start_seconds, span.end_seconds) for name, span in spans.items()}
    assert times["0P0"] == times["1P0"] == (0, 0)
    assert times["0U0"] == (0, 3) and times["0F0"] == (3, 7)
    assert times["1U0"] == (7, 7) and times["1B0"] == (11, 19)  # gathered from 3 to 6
    assert times["1G0"] == (19, 21) and times["0G0"] == (29, 31)
    slow = [replace(COST, gather_seconds=9)] * 2
    spans = {str(s.instruction): s for s in simulate(made, slow).spans}
    assert spans["1U0"].seconds == 5  # from 9 to 18, of which 0F0 hides 4


def test_parameters_and_gradients_are_whole_for_a_part_of_the_step() -> None:
    plain = replace(parse_schedule("one device", "0F0 1F0 1B0 0B0"), regathered=(0,))
    made = with_gathers(plain, {0: 0, 1: 1})
    assert str(made) == "0P0 1P0 0U0 0F0 0S0 1U0 1F0 0P1 1B0 1G0 1S0 0U1 0B0 0G0 0S1"
    levels = [level for _, level in simulate(made, [COST] * 2).activation_bytes(0, [COST] * 2)]
    # Stage 0 is given up after its forward (210 -> 110), and comes back during 1B0, which makes
    # the gradients of stage 1.
    assert levels == [100, 200, 210, 110, 120, 220, 310, 210, 110, 200, 100, 0]


def test_exchanges_are_rings_on_the_axes() -> None:
    axes = [*data_axes(MeshShape.of("pp=2,dp_replicate=2,dp_shard=4,tp=2"), _link)]
    assert [(shards, length) for shards, length, *_ in axes] == [(False, 2), (True, 4)]
    (cost,) = sharded_costs([replace(COST, parameter_bytes=800, trainable_bytes=400)], axes)
    assert cost.gather_seconds == 3 * 200 and cost.gathered_bytes == 800
    assert cost.reduce_seconds == 3 * 100 + 2 * 50 * 10 and cost.gradient_sum_bytes == 400


def _link(span: int) -> LinkCost:
    return LinkCost(seconds_per_byte=1 if span <= 8 else 10)


def on_one_device(memory_bytes: int) -> MeshCost:
    """Two stages, one after the other, as `interleaved` has them on one device."""
    cells = [
        CellCost(name=str(i), forward_seconds=1, backward_seconds=2, parameter_bytes=1000)
        for i in range(4)
    ]
    return MeshCost(
        shape=MeshShape.of("pp=2,dp_shard=4"),
        plan=Plan(
            balance=(1,) * 4,
            num_microbatches=1,
            schedule="two each",
            programs=("0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0"),
            cells=tuple(cells),
        ),
        room=Room(device="test", memory_bytes=memory_bytes, state_factor=4.0),
        link_over=lambda _: LinkCost(seconds_per_byte=1e-6),
    )


def test_stages_are_gathered_again_where_memory_is_short() -> None:
    """Kept are 2 x 1000 bytes; whole are both parameters, and the gradients of one at a time."""
    enough = on_one_device(10_000)
    assert enough.within_memory() is enough
    assert enough.device_bytes == (2000 + 3000,) * 2
    assert num_gathers(enough.sharded_schedule) == {0: 1, 1: 1, 2: 1, 3: 1}
    short = on_one_device(4_999)
    fitted = short.within_memory()
    # A gather that starts ahead, beside 2B0, needs memory for both.
    assert not short.fits and fitted.fits and not fitted.plan.gathers_ahead
    assert fitted.plan.regathered == (0, 1) and fitted.device_bytes == (4000, 4000)
    assert num_gathers(fitted.sharded_schedule) == {0: 2, 1: 2, 2: 1, 3: 1}
    assert fitted.step_seconds == short.step_seconds  # device 0 has time before 0B0
    assert "gathers every stage once a step, 2 times stage 0, 2 times stage 1" in str(fitted)
    assert not on_one_device(3_999).within_memory().fits
    with pytest.raises(ScheduleError, match="regathered names"):
        replace(short, plan=replace(short.plan, regathered=(9,)))
