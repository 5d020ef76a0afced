"""What a plan needs per device, and what one device and data parallelism would take."""

from stagewise.costs import CellCost, LinkCost
from stagewise.planning import plan_from_costs
from stagewise.planning.alternatives import Room, outlook_of

CELL = CellCost(
    name="a",
    forward_seconds=1.0,
    backward_seconds=2.0,
    parameter_bytes=100,
    activation_bytes=10,
    output_bytes=1,
    gradient_bytes=1,
)


def room(memory: int) -> Room:
    return Room(device="toy", memory_bytes=memory, state_factor=4.0)


def test_a_plan_fits_or_does_not() -> None:
    plan = plan_from_costs([CELL] * 4, num_stages=2, num_microbatches=4)
    assert plan.peak_activation_bytes == (40, 21)  # two in flight, then one with its input
    needs = (800 + 40, 800 + 21)
    assert outlook_of(plan, room(840)).device_bytes == needs
    assert outlook_of(plan, room(840)).fits
    assert not outlook_of(plan, room(839)).fits


def test_one_device_and_data_parallelism() -> None:
    link = LinkCost(latency_seconds=0.5, seconds_per_byte=0.01)
    plan = plan_from_costs([CELL] * 4, num_stages=2, num_microbatches=4, link=link)
    one, parallel = outlook_of(plan, room(840)).alternatives
    assert (one.step_seconds, one.needed_bytes) == (4 * 4 * 3.0, 4 * 400 + 40)
    assert parallel.step_seconds == 24.0 + 2 * (0.5 + 200 * 0.01)  # a ring of two: 2 messages
    assert parallel.needed_bytes == one.needed_bytes and not parallel.excludes
    free = plan_from_costs([CELL] * 4, num_stages=2, num_microbatches=4)
    assert "link is unknown" in outlook_of(free, room(840)).alternatives[1].excludes
    alone = plan_from_costs([CELL], num_stages=1, num_microbatches=4)
    assert len(outlook_of(alone, room(840)).alternatives) == 1


def test_stages_that_share_a_device_add_up() -> None:
    plan = plan_from_costs([CELL] * 4, num_stages=4, num_microbatches=2, schedule="interleaved")
    assert [need - 800 for need in outlook_of(plan, room(1)).device_bytes] == [
        *plan.peak_activation_bytes
    ]
