from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.costs import LinkCost, StageCost
from stagewise.errors import PlanError
from stagewise.planning import simulate, unit_costs
from stagewise.schedule import (
    POLICIES,
    Kind,
    Schedule,
    forward_only,
    grid,
    lower,
    named_schedule,
    parse_programs,
    validate,
    with_recompute,
)
from stagewise.schedule.running_order import slots
from tests.schedules import Sized, sized

SECONDS = st.integers(0, 50)


def cost(forward: float, backward: float, recompute: float | None = None) -> StageCost:
    return StageCost(
        forward_seconds=forward,
        backward_seconds=backward,
        recompute_seconds=forward if recompute is None else recompute,
        input_seconds=backward // 2,
        weight_seconds=backward - backward // 2,
        output_bytes=1,
        gradient_bytes=1,
    )


@settings(max_examples=200)
@given(
    size=sized(max_microbatches=12),
    data=st.data(),
    policy=st.sampled_from(sorted(POLICIES)),
    latency=SECONDS,
)
def test_properties_of_any_prediction(
    size: Sized, data: st.DataObject, policy: str, latency: int
) -> None:
    seconds = st.tuples(SECONDS, SECONDS, SECONDS)
    costs = [cost(*data.draw(seconds)) for _ in range(size.num_stages)]
    schedule = with_recompute(size.build(), policy)
    link = LinkCost(latency_seconds=latency)
    timeline = simulate(schedule, costs, link)

    # Every instruction runs once, for its cost, in program order, one at a time.
    ran = {(span.device, span.instruction): span for span in timeline.spans}
    assert len(ran) == len(timeline.spans)
    assert set(ran) == set(schedule.instructions())
    for device, program in enumerate(schedule.programs):
        now = 0
        for instruction in program:
            span = ran[device, instruction]
            assert span.start_seconds >= now
            assert span.seconds == seconds_of(instruction.kind, costs[instruction.stage])
            now = span.end_seconds

    # Nothing starts before what it waits for has ended and travelled.
    ended = {
        (i.stage, Kind.BACKWARD if i.kind is Kind.BACKWARD_INPUT else i.kind, i.microbatch): (
            span.end_seconds
        )
        for (_, i), span in ran.items()
    }
    for device, steps in enumerate(lower(schedule)):
        for step in steps:
            for message in step.receives:
                sent = ended[message.source_stage, message.kind, message.microbatch]
                travels = latency if message.source != message.destination else 0
                assert ran[device, step.instruction].start_seconds >= sent + travels

    # No step is shorter than the busiest device, nor than one microbatch's way there and back.
    assert timeline.duration_seconds >= max(timeline.busy_seconds)
    back = [c.backward_seconds for c in costs]
    if any(i.kind is Kind.BACKWARD_INPUT for _, i in schedule.instructions()):
        back = [min(c.input_seconds, c.backward_seconds) for c in costs]
    way = sum(c.forward_seconds for c in costs) + sum(back)
    crossed = sum(a != b for a, b in pairwise(schedule.placement))
    assert timeline.duration_seconds >= way + 2 * crossed * latency
    assert 0 <= timeline.bubble_fraction < 1


def seconds_of(kind: Kind, stage: StageCost) -> float:
    return {
        Kind.FORWARD: stage.forward_seconds,
        Kind.BACKWARD: stage.backward_seconds,
        Kind.RECOMPUTE: stage.recompute_seconds,
        Kind.BACKWARD_INPUT: stage.input_seconds,
        Kind.BACKWARD_WEIGHT: stage.weight_seconds,
    }[kind]


@given(sized(), st.sampled_from(sorted(POLICIES)))
def test_unit_costs_give_the_grid(size: Sized, policy: str) -> None:
    schedule = with_recompute(size.build(), policy)
    timeline = simulate(schedule, unit_costs(size.num_stages))
    starts: list[list[float]] = [[] for _ in schedule.programs]
    for span in timeline.spans:
        starts[span.device].append(span.start_seconds)
    assert starts == slots(schedule)
    assert timeline.duration_seconds == len(grid(schedule).splitlines()[0].split()) - 2


@given(sized(max_microbatches=12), st.data())
def test_recomputing_never_ends_earlier(size: Sized, data: st.DataObject) -> None:
    costs = [cost(*data.draw(st.tuples(SECONDS, SECONDS))) for _ in range(size.num_stages)]
    plain = size.build()
    never, except_last, always = (
        simulate(with_recompute(plain, policy), costs).duration_seconds
        for policy in ("never", "except_last", "always")
    )
    assert never <= except_last <= always


def spans_of(schedule: Schedule, costs: Sequence[StageCost], link: LinkCost) -> list[str]:
    return [
        f"{span.device} {span.instruction} {span.start_seconds}-{span.end_seconds}"
        for span in simulate(schedule, costs, link).spans
    ]


def test_recomputation_overlaps_the_gradients_way() -> None:
    schedule = with_recompute(named_schedule("gpipe", 2, 2), "always")
    costs = [StageCost(forward_seconds=1, backward_seconds=2, recompute_seconds=1)] * 2
    link = LinkCost(latency_seconds=1)
    spans = spans_of(schedule, costs, link)
    # 1B0 ends at 9 and its gradient arrives at 10; device 0 is free from 9 and recomputes then.
    assert "1 1B0 7-9" in spans
    assert "0 0B1 7-9" in spans
    assert "0 0R0 9-10" in spans
    assert "0 0B0 10-12" in spans


def test_a_link_carries_one_message_at_a_time() -> None:
    costs = [
        StageCost(forward_seconds=1, backward_seconds=1, recompute_seconds=1, output_bytes=30)
    ] * 2
    link = LinkCost(latency_seconds=1, seconds_per_byte=0.1)  # 4 seconds a message
    spans = spans_of(forward_only([(d,) for d in range(2)], 3), costs, link)
    assert [s for s in spans if s.startswith("1")] == [
        "1 1F0 5.0-6.0",  # left at 1
        "1 1F1 9.0-10.0",  # ready at 2, left at 5
        "1 1F2 13.0-14.0",
    ]


def test_activations_and_gradients_have_their_own_sizes_and_links() -> None:
    def stage(output_bytes: int, gradient_bytes: int) -> StageCost:
        return StageCost(
            forward_seconds=1,
            backward_seconds=1,
            recompute_seconds=1,
            output_bytes=output_bytes,
            gradient_bytes=gradient_bytes,
        )

    spans = spans_of(
        named_schedule("gpipe", 2, 1), [stage(3, 5), stage(100, 100)], LinkCost(seconds_per_byte=1)
    )
    assert spans == ["0 0F0 0-1", "1 1F0 4-5", "1 1B0 5-6", "0 0B0 11-12"]


def test_stages_on_one_device_send_for_free() -> None:
    schedule = Schedule(
        name="one device",
        programs=parse_programs("0F0 1F0 1B0 0B0"),
        placement=((0,), (0,)),
        num_microbatches=1,
    )
    timeline = simulate(validate(schedule), unit_costs(2), LinkCost(latency_seconds=9))
    assert timeline.duration_seconds == 4


def test_costs_must_match_the_stages() -> None:
    with pytest.raises(PlanError, match="got costs of 3 stages for a schedule of 2"):
        simulate(named_schedule("gpipe", 2, 2), unit_costs(3))


def test_a_split_backward_takes_its_two_costs() -> None:
    schedule = Schedule(
        name="split",
        programs=parse_programs("0F0 0I0 0W0"),
        placement=((0,),),
        num_microbatches=1,
    )
    cost = StageCost(
        forward_seconds=1,
        backward_seconds=9,
        recompute_seconds=1,
        input_seconds=2,
        weight_seconds=4,
        input_bytes=10,
        activation_bytes=100,
        deferred_bytes=30,
    )
    timeline = simulate(schedule, [cost])
    assert [span.end_seconds for span in timeline.spans] == [1, 3, 7]
    assert timeline.activation_bytes(0, [cost]) == ((0, 110), (3, 30), (7, 0))


def test_a_sender_is_busy_for_the_overhead_of_each_message() -> None:
    schedule = named_schedule("gpipe", 2, 2)
    costs = [cost(10, 20)] * 2
    spans = simulate(schedule, costs, LinkCost(latency_seconds=3, overhead_seconds=2)).spans
    starts = {str(span.instruction): span.start_seconds for span in spans}
    assert starts["0F1"] == 12
    assert starts["1F0"] == 15
    assert starts["1F1"] == 27
