from collections.abc import Sequence
from dataclasses import replace

import pytest

from stagewise.costs import CellCost, InstructionCost, LinkCost, StageCost, stage_costs
from stagewise.planning import simulate
from stagewise.planning.calibrate import (
    EngineOverhead,
    engine_overhead,
    message_seconds,
    with_engine_overhead,
)
from stagewise.schedule import SCHEDULES, Kind, named_schedule, with_recompute
from stagewise.timeline import Span, Timeline

STAGE = StageCost(
    forward_seconds=2, backward_seconds=4, recompute_seconds=2, input_seconds=2, weight_seconds=2
)


def surrounded(cells: list[CellCost], overhead: InstructionCost) -> tuple[CellCost, ...]:
    return with_engine_overhead(cells, EngineOverhead(per_stage=overhead))


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
    timeline = simulate(schedule, stage_costs(surrounded(cells, truth), each))
    known = engine_overhead([(cells, each, [timeline])])
    again = simulate(schedule, stage_costs(with_engine_overhead(cells, known), each))
    assert again.duration_seconds == pytest.approx(timeline.duration_seconds, rel=0.02)
    read = known.per_stage
    if sign < 0:  # the cells take less
        assert min(vars(read).values()) >= 0
        return
    kinds = {instruction.kind for _, instruction in schedule.instructions()}
    assert read.forward_seconds == pytest.approx(truth.forward_seconds)
    assert read.backward_seconds == pytest.approx(truth.backward_seconds)
    if Kind.BACKWARD_INPUT in kinds:
        assert read == InstructionCost(**{k: pytest.approx(v) for k, v in vars(truth).items()})
    again = simulate(schedule, stage_costs(surrounded(cells, read), each))
    assert again.duration_seconds == pytest.approx(timeline.duration_seconds)


def test_recomputations_have_no_overhead_of_their_own() -> None:
    """They cost a forward: InstructionCost has no seconds of theirs."""
    schedule = with_recompute(named_schedule("gpipe", 2, 4), "always")
    cells = [CellCost(name="cell", forward_seconds=1, backward_seconds=2)] * 2
    truth = InstructionCost(forward_seconds=0.5, backward_seconds=0.5)
    timeline = simulate(schedule, stage_costs(surrounded(cells, truth), (1, 1)))
    known = engine_overhead([(cells, (1, 1), [timeline])])
    again = simulate(schedule, stage_costs(with_engine_overhead(cells, known), (1, 1)))
    assert again.duration_seconds == pytest.approx(timeline.duration_seconds)


def test_finer_stages_are_not_free_because_one_cell_was_measured_wrongly() -> None:
    """A cheap cell alone on its stage made every instruction cost less than nothing: stages of one
    cell were predicted at a fifth of their time.
    """
    cells = [CellCost(name="cell", forward_seconds=2, backward_seconds=4)] * 8
    truth = [
        CellCost(name="cell", forward_seconds=f, backward_seconds=2 * f) for f in (0.2, *[1.0] * 7)
    ]
    schedule, sizes = named_schedule("1f1b", 2, 8), (1, 7)
    known = engine_overhead([(cells, sizes, [simulate(schedule, stage_costs(truth, sizes))])])
    for each in (sizes, (1,) * 8):
        costs = stage_costs(with_engine_overhead(cells, known), each)
        assert sum(cost.forward_seconds for cost in costs) == pytest.approx(7.2, rel=0.1)


def test_a_stage_is_surrounded_once_whatever_its_cells() -> None:
    cell = CellCost(name="cell", forward_seconds=2, backward_seconds=4)
    overhead = InstructionCost(forward_seconds=0.5, backward_seconds=-5)
    one, two = stage_costs(surrounded([cell] * 3, overhead), [1, 2])
    assert (one.forward_seconds, two.forward_seconds) == (2.5, 4.5)
    assert (one.recompute_seconds, two.recompute_seconds) == (2.5, 4.5)
    assert (one.backward_seconds, two.backward_seconds) == (0, 3)  # never below 0


def test_where_nothing_ran_nothing_is_known() -> None:
    cell = CellCost(name="cell", forward_seconds=2, backward_seconds=4)
    assert engine_overhead([]) == engine_overhead([([cell], [1], [])]) == EngineOverhead()


SPLIT = "input_seconds", "weight_seconds"


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (3, 3), (1, 5)])
@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_the_engines_work_for_a_cell_alone_is_not_counted_for_every_cell(
    sizes: tuple[int, ...], name: str
) -> None:
    """A cell's cost contains it; a stage has it once. It was priced at what that plan's had."""
    engine, work = 0.5, (1.0, 2.0, 3.0)
    cells = [
        CellCost(
            name="cell",
            forward_seconds=work[0] + engine,
            backward_seconds=work[1] + work[2] + engine,
            input_seconds=work[1] + engine,
            weight_seconds=work[2] + engine,
        )
    ] * 6

    def truth(sizes: tuple[int, ...]) -> float:
        costs = [
            StageCost(
                forward_seconds=n * work[0] + engine,
                backward_seconds=n * (work[1] + work[2]) + engine,
                recompute_seconds=0,
                input_seconds=n * work[1] + engine,
                weight_seconds=n * work[2] + engine,
            )
            for n in sizes
        ]
        return simulate(named_schedule(name, len(sizes), 4), costs).duration_seconds

    costs = stage_costs(cells, sizes)
    ran = simulate(
        named_schedule(name, len(sizes), 4),
        [
            replace(cost, **{n: seconds - engine * (size - 1) for n, seconds in times(cost)})
            for cost, size in zip(costs, sizes, strict=True)
        ],
    )
    assert ran.duration_seconds == pytest.approx(truth(sizes))
    known = engine_overhead([(cells, sizes, [ran, ran])])
    for other in [(6,), (2, 2, 2), (1, 1, 1, 1, 1, 1)]:
        if sizes != (1,) * 6 or other == sizes:  # of cells that ran alone only, nothing is known
            again = stage_costs(with_engine_overhead(cells, known), other)
            predicted = simulate(named_schedule(name, len(other), 4), again)
            assert predicted.duration_seconds == pytest.approx(truth(other))


def times(cost: StageCost) -> list[tuple[str, float]]:
    names = "forward_seconds", "backward_seconds", *SPLIT
    return [(name, getattr(cost, name)) for name in names]


def test_a_cell_never_takes_less_than_nothing() -> None:
    """The engine's work is less than the cheapest cell took, whatever noisy steps show."""
    cheap, dear = (
        CellCost(name=str(t), forward_seconds=t, backward_seconds=2 * t) for t in (0.1, 9.0)
    )
    sizes = (1, 2)
    faster = [
        replace(cost, forward_seconds=0.0) for cost in stage_costs([cheap, dear, dear], sizes)
    ]
    ran = simulate(named_schedule("1f1b", 2, 4), faster)
    known = engine_overhead([([cheap, dear, dear], sizes, [ran])])
    assert known.per_cell.forward_seconds == pytest.approx(-0.09)
    found = with_engine_overhead([cheap, dear], known)
    assert [cell.forward_seconds for cell in found] == pytest.approx([0.01, 8.91])


@pytest.mark.parametrize("split", [False, True])
def test_what_cells_were_measured_wrongly_at_is_corrected_by_the_stages_that_ran(
    split: bool,
) -> None:
    """Only what all stages had in common was: a demo's step was predicted at half of its time."""

    def cost(seconds: float) -> CellCost:
        return CellCost(
            name="cell",
            forward_seconds=seconds,
            backward_seconds=2 * seconds,
            input_seconds=1.1 * seconds,
            weight_seconds=0.9 * seconds,
        )

    truth = [cost(seconds) for seconds in (1, 4, 2, 3, 1, 5)]
    wrong = [cost(seconds) for seconds in (1.3, 1.5, 2, 4.5, 0.7, 3)]
    names = "zb_h1" if split else "1f1b", "gpipe"

    def step(name: str, cells: Sequence[CellCost], sizes: tuple[int, ...]) -> Timeline:
        return simulate(named_schedule(name, len(sizes), 8), stage_costs(cells, sizes))

    tried = [(names[0], (2, 4)), (names[1], (3, 3)), (names[0], (2, 2, 2))]
    ran = [(wrong, sizes, [step(name, truth, sizes)]) for name, sizes in tried]
    better = with_engine_overhead(wrong, engine_overhead(ran))
    for name, sizes in [*tried, (names[1], (2, 4)), (names[0], (3, 3))]:
        most = 0.01 if (name, sizes) in tried else 0.05
        real = step(name, truth, sizes).duration_seconds
        assert step(name, better, sizes).duration_seconds == pytest.approx(real, rel=most)


def test_interruptions_that_hit_another_instruction_every_step_are_counted() -> None:
    """Every instruction's median was as on an idle host, and the step took twice as long."""
    cells = [CellCost(name="cell", forward_seconds=1, backward_seconds=2)] * 4
    schedule, sizes = named_schedule("gpipe", 2, 5), (2, 2)
    quiet = simulate(schedule, stage_costs(cells, sizes))

    def interrupted(number: int) -> Timeline:
        spans = [
            replace(span, end_seconds=span.end_seconds + 30 * (index % 5 == number))
            for index, span in enumerate(sorted(quiet.spans, key=lambda s: str(s.instruction)))
        ]
        return Timeline(2, tuple(spans))

    known = engine_overhead([(cells, sizes, [interrupted(number) for number in range(5)])])
    costs = stage_costs(with_engine_overhead(cells, known), sizes)
    both = [cost.forward_seconds + cost.backward_seconds for cost in costs]
    assert both == pytest.approx([6 + 30 * 2 / 5] * 2, rel=0.02)
