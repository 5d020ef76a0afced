import pytest

from stagewise.costs import CellCost, InstructionCost, LinkCost, StageCost, stage_costs
from stagewise.planning import simulate
from stagewise.planning.calibrate import (
    instruction_cost,
    message_seconds,
    with_instruction_overhead,
)
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
@pytest.mark.parametrize("apart", [0.2, -3.0, 50.0])
def test_clocks_that_differ_between_devices_cancel_out(name: str, apart: float) -> None:
    """Also where both activations and gradients go down a link, as on looped placement."""
    schedule = named_schedule(name, 3, 8)
    timeline = simulate(schedule, [STAGE] * schedule.num_stages, LinkCost(latency_seconds=0.5))
    shifted = Timeline(
        3,
        tuple(
            Span(
                device=span.device,
                instruction=span.instruction,
                start_seconds=span.start_seconds + apart * span.device,
                end_seconds=span.end_seconds + apart * span.device,
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
@pytest.mark.parametrize("sign", [1, -1])
def test_what_instructions_take_beyond_their_cells_is_read_back(name: str, sign: int) -> None:
    schedule = named_schedule(name, 3, 8)
    cells = [
        CellCost(name=str(index), forward_seconds=1 + index, backward_seconds=2 + 2 * index)
        for index in range(schedule.num_stages)
    ]
    each = [1] * schedule.num_stages
    truth = InstructionCost(
        forward_seconds=sign * 0.5,
        backward_seconds=sign * 0.75,
        input_seconds=sign * 0.25,
        weight_seconds=sign * 0.5,
    )
    timeline = simulate(schedule, stage_costs(with_instruction_overhead(cells, truth), each))
    read = instruction_cost(stage_costs(cells, each), [timeline])
    kinds = {instruction.kind for _, instruction in schedule.instructions()}
    assert read.forward_seconds == pytest.approx(truth.forward_seconds)
    assert read.backward_seconds == pytest.approx(truth.backward_seconds)
    if Kind.BACKWARD_INPUT in kinds:
        assert read == InstructionCost(**{k: pytest.approx(v) for k, v in vars(truth).items()})
    again = simulate(schedule, stage_costs(with_instruction_overhead(cells, read), each))
    assert again.duration_seconds == pytest.approx(timeline.duration_seconds)


def test_a_stage_is_surrounded_once_whatever_its_cells() -> None:
    cell = CellCost(name="cell", forward_seconds=2, backward_seconds=4)
    overhead = InstructionCost(forward_seconds=0.5, backward_seconds=-5)
    one, two = stage_costs(with_instruction_overhead([cell] * 3, overhead), [1, 2])
    assert (one.forward_seconds, two.forward_seconds) == (2.5, 4.5)
    assert (one.recompute_seconds, two.recompute_seconds) == (2.5, 4.5)
    assert (one.backward_seconds, two.backward_seconds) == (0, 3)  # never below 0


def test_where_nothing_ran_nothing_is_known() -> None:
    assert instruction_cost([STAGE], []) == InstructionCost()
