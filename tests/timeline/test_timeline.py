import itertools
import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.costs import StageCost
from stagewise.planning import simulate, unit_costs
from stagewise.schedule import POLICIES, Instruction, Kind, named_schedule, with_recompute
from stagewise.schedule.instruction import KINDS
from stagewise.timeline import Span, Timeline, kept_bytes
from tests.planning.costs import stage_costs_drawn
from tests.schedules import Sized, sized


def timeline_of(text: str, num_devices: int = 1) -> Timeline:
    """From lines of `device instruction start end`."""
    rows = [line.split() for line in text.strip().splitlines()]
    return Timeline(
        num_devices,
        tuple(
            Span(
                device=int(device),
                instruction=Instruction.parse(instruction),
                start_seconds=float(start),
                end_seconds=float(end),
            )
            for device, instruction, start, end in rows
        ),
    )


def test_duration_busy_and_bubble() -> None:
    timeline = timeline_of("0 0F0 0 1\n1 1F0 1 3\n1 1B0 3 4\n0 0B0 5 6", num_devices=2)
    assert timeline.duration_seconds == 6
    assert timeline.busy_seconds == (2, 3)
    assert timeline.bubble_fraction == pytest.approx(7 / 12)
    assert [span.seconds for span in timeline.spans] == [1, 2, 1, 1]


def test_an_empty_timeline() -> None:
    timeline = Timeline(2, ())
    assert timeline.duration_seconds == 0
    assert timeline.busy_seconds == (0, 0)
    assert timeline.bubble_fraction == 0
    assert timeline.peak_in_flight(1) == 0


def test_in_flight_rises_at_the_forwards_start_and_falls_at_the_backwards_end() -> None:
    timeline = timeline_of("0 0F0 0 1\n0 0F1 1 2\n0 0R1 2 3\n0 0B1 3 5\n0 0B0 5 7")
    assert timeline.in_flight(0) == ((0, 1), (1, 2), (5, 1), (7, 0))
    assert timeline.peak_in_flight(0) == 2


def test_what_ends_goes_before_what_begins() -> None:
    assert timeline_of("0 0F0 0 1\n0 0B0 1 2\n0 0F1 2 3\n0 0B1 3 4").peak_in_flight(0) == 1


def test_instructions_that_take_no_time_count_too() -> None:
    # A forward and its backward at one instant once gave -1, then 0: a peak of nothing.
    timeline = timeline_of("0 0F0 2 2\n0 0B0 2 2\n0 0F1 2 3\n0 0B1 3 3")
    assert [count for _, count in timeline.in_flight(0)] == [1, 0, 1, 0]


def test_a_split_backward_frees_with_its_weights_half() -> None:
    timeline = timeline_of("0 0F0 0 1\n0 0I0 1 2\n0 0W0 2 3")
    assert timeline.in_flight(0) == ((0, 1), (3, 0))


COST = StageCost(
    forward_seconds=1,
    backward_seconds=2,
    recompute_seconds=1,
    input_bytes=10,
    activation_bytes=100,
)


def test_activation_bytes_without_recomputation() -> None:
    timeline = timeline_of("0 0F0 0 1\n0 0F1 1 2\n0 0B1 2 4\n0 0B0 4 6")
    assert timeline.activation_bytes(0, [COST]) == ((0, 110), (1, 220), (4, 110), (6, 0))
    assert timeline.peak_activation_bytes([COST]) == (220,)


def test_activation_bytes_with_recomputation() -> None:
    timeline = timeline_of("0 0F0 0 1\n0 0F1 1 2\n0 0B1 2 4\n0 0R0 4 5\n0 0B0 5 7")
    assert timeline.activation_bytes(0, [COST]) == (
        (0, 10),
        (1, 120),
        (4, 10),
        (4, 110),
        (7, 0),
    )
    assert timeline.peak_activation_bytes([COST]) == (120,)


@given(
    size=sized(max_devices=6, max_microbatches=12),
    policy=st.sampled_from(sorted(POLICIES)),
    costs=st.data(),
)
def test_curves_never_fall_below_zero_and_end_there(
    size: Sized, policy: str, costs: st.DataObject
) -> None:
    numbers = st.tuples(*[st.integers(0, 3)] * 5, *[st.integers(0, 5)] * 3)
    stages = [
        StageCost(
            forward_seconds=forward,
            backward_seconds=backward,
            recompute_seconds=recompute,
            input_seconds=for_inputs,
            weight_seconds=for_weights,
            input_bytes=given,
            activation_bytes=kept,
            deferred_bytes=deferred,
        )
        for forward, backward, recompute, for_inputs, for_weights, given, kept, deferred in (
            costs.draw(numbers) for _ in range(size.num_stages)
        )
    ]
    # What a product keeps of its stage's input, the stage before has made.
    stages[1:] = [
        replace(stage, deferred_input_bytes=min(stage.deferred_bytes, before.activation_bytes))
        for before, stage in itertools.pairwise(stages)
    ]
    schedule = with_recompute(size.build(), policy)
    timeline = simulate(schedule, stages)
    assert sum(timeline.busy_seconds) == sum(span.seconds for span in timeline.spans)
    for device in range(size.num_devices):
        for curve in (timeline.in_flight(device), timeline.activation_bytes(device, stages)):
            assert [time for time, _ in curve] == sorted(time for time, _ in curve)
            assert all(value >= 0 for _, value in curve)
            assert not curve or curve[-1][1] == 0


def test_what_one_stage_gives_another_on_its_device_is_kept_once() -> None:
    """Unless the giving stage drops its output and makes it again."""
    cost = StageCost(
        forward_seconds=1,
        backward_seconds=1,
        recompute_seconds=1,
        input_bytes=10,
        activation_bytes=100,
    )
    for policy, peak in (("never", 10 + 100 + 100), ("always", 10 + 10 + 100)):
        schedule = with_recompute(named_schedule("interleaved", 1, 1), policy)
        timeline = simulate(schedule, [cost] * 2)
        assert timeline.peak_activation_bytes([cost] * 2) == (peak,)
        assert timeline.activation_bytes(0, [cost] * 2)[-1][1] == 0
    apart = simulate(named_schedule("1f1b", 2, 1), [cost] * 2)
    assert apart.peak_activation_bytes([cost] * 2) == (110, 110)


def test_what_a_weight_still_needs_of_it_is_kept_longer() -> None:
    """Stage 1's product needs its input (4 bytes), which is stage 0's output, until its `W`."""
    parts = {"forward_seconds": 1.0, "backward_seconds": 1.0, "recompute_seconds": 1.0}
    costs = [
        StageCost(**parts, activation_bytes=10, deferred_bytes=3),
        StageCost(
            **parts, input_bytes=4, activation_bytes=6, deferred_bytes=7, deferred_input_bytes=4
        ),
    ]

    def levels(*words: str) -> list[int]:
        program = "\n".join(f"0 {word} {t} {t + 1}" for t, word in enumerate(words))
        return [value for _, value in timeline_of(program).activation_bytes(0, costs)]

    assert levels("0F0", "1F0", "1I0", "0I0", "1W0", "0W0") == [10, 16, 13, 10, 3, 0]
    assert levels("0F0", "1F0", "1I0", "1W0", "0I0", "0W0") == [10, 16, 13, 10, 3, 0]
    assert levels("0F0", "1F0", "1I0", "0B0", "1W0") == [10, 16, 13, 7, 0]
    assert levels("0F0", "1F0", "1B0", "0I0", "0W0") == [10, 16, 10, 3, 0]


@settings(max_examples=60)
@given(sized(4, 6), st.sampled_from(sorted(POLICIES)), st.data())
def test_kept_bytes_are_those_of_what_lives(size: Sized, policy: str, data: st.DataObject) -> None:
    """Counted anew after every instruction, from what the table says is kept and freed."""
    schedule = with_recompute(size.build(), policy)
    costs = [data.draw(stage_costs_drawn()) for _ in range(size.num_stages)]

    def lends(stage: int, m: int) -> bool:
        giver = stage - 1, m
        return (
            stage > 0
            and schedule.device_of(*giver) == schedule.device_of(stage, m)
            and giver not in schedule.recomputed
        )

    def num_bytes(field: str, stage: int, m: int) -> int:
        if not lends(stage, m):
            return getattr(costs[stage], field)  # type: ignore[no-any-return]
        cost, released = costs[stage], costs[stage - 1].released_output_bytes
        if field == "input_bytes":
            return min(cost.input_bytes, released)
        lent = field == "deferred_bytes" and ("activation_bytes", stage - 1, m) in alive
        lent_bytes = lent * max(0, cost.deferred_input_bytes - released)
        return getattr(cost, field) - lent_bytes  # type: ignore[no-any-return]

    for program in schedule.programs:
        alive: set[tuple[str, int, int]] = set()
        levels = []
        for i in program:
            stored = i.kind is Kind.FORWARD and (i.stage, i.microbatch) in schedule.recomputed
            keeps = set(KINDS[i.kind].keeps).difference(KINDS[Kind.RECOMPUTE].keeps * stored)
            alive |= {(field, i.stage, i.microbatch) for field in keeps}
            alive -= {(field, i.stage, i.microbatch) for field in KINDS[i.kind].frees}
            levels.append(sum(num_bytes(*what) for what in alive))
        assert list(itertools.accumulate(kept_bytes(program, costs))) == levels


def test_records_round_trip_through_json() -> None:
    timeline = simulate(with_recompute(named_schedule("1f1b", 3, 4), "always"), unit_costs(3))
    records = json.loads(json.dumps(timeline.to_records()))
    assert records[0] == {
        "device": 0,
        "instruction": "0F0",
        "start_seconds": 0.0,
        "end_seconds": 1.0,
    }
    assert Timeline.from_records(3, records) == timeline


def test_exact_numbers_stay_exact() -> None:
    costs = [
        StageCost(
            forward_seconds=Fraction(1, 3),  # type: ignore[arg-type]
            backward_seconds=Fraction(1, 7),  # type: ignore[arg-type]
            recompute_seconds=0,
        )
    ] * 2
    timeline = simulate(named_schedule("gpipe", 2, 2), costs)
    assert timeline.duration_seconds == 3 * Fraction(10, 21)
    assert timeline.bubble_fraction == Fraction(1, 3)
