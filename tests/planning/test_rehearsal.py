import pytest

from stagewise.costs import CellCost, LinkCost, StageCost, stage_costs
from stagewise.planning import simulate
from stagewise.planning.rehearsal import message_seconds, paced, paces
from stagewise.schedule import SCHEDULES, Kind, named_schedule
from stagewise.timeline import Span, Timeline

STAGE = StageCost(
    forward_seconds=2, backward_seconds=4, recompute_seconds=2, input_seconds=2, weight_seconds=2
)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("num_devices", [2, 3, 5])
def test_what_the_simulator_was_told_is_read_back(name: str, num_devices: int) -> None:
    schedule = named_schedule(name, num_devices, 8)
    for link, expected in [
        (LinkCost(overhead_seconds=0.25), (0.25, 0.25)),
        (LinkCost(latency_seconds=0.5), (0, 0.5)),
        (LinkCost(), (0, 0)),
    ]:
        timeline = simulate(schedule, [STAGE] * schedule.num_stages, link)
        assert message_seconds(schedule, [timeline, timeline]) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_v"])
def test_clocks_that_differ_between_devices_cancel_out(name: str) -> None:
    """Also where both activations and gradients go down a link, as on looped placement."""
    schedule = named_schedule(name, 3, 8)
    timeline = simulate(schedule, [STAGE] * schedule.num_stages, LinkCost(latency_seconds=0.5))
    shifted = Timeline(
        3,
        tuple(
            Span(
                device=span.device,
                instruction=span.instruction,
                start_seconds=span.start_seconds + 0.2 * span.device,
                end_seconds=span.end_seconds + 0.2 * span.device,
            )
            for span in timeline.spans
        ),
    )
    _, waited = message_seconds(schedule, [shifted])
    assert waited == pytest.approx(0.5, abs=0.05)


def test_nothing_sent_nothing_known() -> None:
    schedule = named_schedule("gpipe", 1, 4)
    assert message_seconds(schedule, [simulate(schedule, [STAGE])]) == (0, 0)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_instructions_that_took_longer_than_said(name: str) -> None:
    """Costs made longer by what was read give the timeline that it was read from."""
    schedule = named_schedule(name, 3, 8)
    cells = [
        CellCost(
            name=str(index),
            forward_seconds=1 + index,
            backward_seconds=2 + 2 * index,
            input_seconds=1 + index,
            weight_seconds=1 + index,
        )
        for index in range(schedule.num_stages)
    ]
    each = [1] * schedule.num_stages
    truth = {
        Kind.FORWARD: 1.5,
        Kind.BACKWARD: 1.25,
        Kind.BACKWARD_INPUT: 1.25,
        Kind.BACKWARD_WEIGHT: 1.25,
    }
    timeline = simulate(schedule, stage_costs(paced(cells, truth), each))
    read = paces(stage_costs(cells, each), [timeline])
    assert read == pytest.approx(truth)
    again = simulate(schedule, stage_costs(paced(cells, read), each))
    assert again.duration_seconds == pytest.approx(timeline.duration_seconds)


def test_where_nothing_ran_nothing_changes() -> None:
    cell = CellCost(name="cell", forward_seconds=1, backward_seconds=2)
    assert paced([cell], paces([STAGE], [])) == paced([cell], {}) == (cell,)
