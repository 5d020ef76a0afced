from collections import Counter
from itertools import pairwise

import pytest

from stagewise.schedule import (
    SCHEDULES,
    Kind,
    Message,
    Schedule,
    forward_only,
    links,
    lower,
    named_schedule,
    parse_programs,
    validate,
    walk,
    with_recompute,
)


def test_what_a_middle_stage_receives_and_sends() -> None:
    program = lower(named_schedule("gpipe", 3, 1))[1]
    forward, backward = program
    assert forward.receives == (Message(Kind.FORWARD, 0, 0, 1, 0, 1),)
    assert forward.sends == (Message(Kind.FORWARD, 0, 1, 2, 1, 2),)
    assert backward.receives == (Message(Kind.BACKWARD, 0, 2, 1, 2, 1),)
    assert backward.sends == (Message(Kind.BACKWARD, 0, 1, 0, 1, 0),)


def test_the_ends_of_the_pipeline_neither_receive_nor_send() -> None:
    first, *_, last = lower(named_schedule("gpipe", 3, 1))
    assert first[0].receives == () and first[1].sends == ()
    assert last[0].sends == () and last[1].receives == ()


def test_a_recomputation_waits_for_nothing_and_sends_nothing() -> None:
    schedule = with_recompute(named_schedule("gpipe", 3, 2), "always")
    steps = [s for p in lower(schedule) for s in p if s.instruction.kind is Kind.RECOMPUTE]
    assert steps
    assert all(step.receives == () and step.sends == () for step in steps)


def test_forward_only_sends_no_gradient() -> None:
    programs = lower(forward_only([(d,) for d in range(3)], 2))
    sent = [message for program in programs for step in program for message in step.sends]
    assert {message.kind for message in sent} == {Kind.FORWARD}


def test_order_on_links_is_the_senders_order() -> None:
    order = links(lower(named_schedule("gpipe", 2, 3)))
    assert [m.microbatch for m in order[0, 1]] == [0, 1, 2]
    assert [m.microbatch for m in order[1, 0]] == [2, 1, 0]
    assert order.keys() == {(0, 1), (1, 0)}


@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
@pytest.mark.parametrize("num_devices", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_message_is_sent_once_and_received_once(
    name: str, num_devices: int, num_microbatches: int
) -> None:
    """In link order where a device has one stage; else a message may overtake one of other kind."""
    schedule = named_schedule(name, num_devices, num_microbatches)
    programs = lower(schedule)
    order = links(programs)
    for (source, destination), sent in order.items():
        received = [
            message
            for step in programs[destination]
            for message in step.receives
            if message.source == source
        ]
        if SCHEDULES[name].stages_per_device == 1:
            assert received == list(sent)
        assert Counter(received) == Counter(sent)
        assert len(set(sent)) == len(sent)
    boundaries = sum(a != b for a, b in pairwise(schedule.placement))
    assert sum(map(len, order.values())) == 2 * boundaries * num_microbatches


def test_a_split_backward_sends_its_gradient_from_the_first_half() -> None:
    schedule = Schedule(
        name="split",
        programs=parse_programs("0F0 0I0 0W0\n1F0 1I0 1W0"),
        placement=((0,), (1,)),
        num_microbatches=1,
    )
    first, second = lower(validate(schedule))
    gradient = Message(Kind.BACKWARD, 0, 1, 0, 1, 0)
    assert [step.sends for step in second] == [(), (gradient,), ()]
    assert [step.receives for step in first] == [(), (gradient,), ()]


def test_stages_on_one_device_use_no_link() -> None:
    schedule = Schedule(
        name="one device",
        programs=parse_programs("0F0 1F0 1B0 0B0"),
        placement=((0,), (0,)),
        num_microbatches=1,
    )
    programs = lower(validate(schedule))
    assert links(programs) == {}
    assert programs[0][1].receives == programs[0][0].sends


def test_replicas_have_links_of_their_own() -> None:
    schedule = Schedule(
        name="replicas",
        programs=parse_programs("0F0 0F1 0F2\n1F0 1F2\n1F1"),
        placement=((0,), (1, 2)),
        num_microbatches=3,
    )
    order = links(lower(validate(schedule)))
    assert [m.microbatch for m in order[0, 1]] == [0, 2]
    assert [m.microbatch for m in order[0, 2]] == [1]


def test_a_message_says_what_travels_where() -> None:
    assert str(Message(Kind.FORWARD, 3, 0, 1, 4, 5)) == (
        "activation of microbatch 3, stage 0 -> 1 (device 4 -> 5)"
    )
    assert str(Message(Kind.BACKWARD, 3, 1, 0, 5, 4)) == (
        "gradient of microbatch 3, stage 1 -> 0 (device 5 -> 4)"
    )


def test_a_skip_has_a_message_of_its_own_in_order_of_distance() -> None:
    first, second, *_, last = lower(named_schedule("gpipe", 5, 1), [(0, 4), (0, 2), (1, 4)])
    near, skip = Message(Kind.FORWARD, 0, 0, 1, 0, 1), Message(Kind.FORWARD, 0, 0, 2, 0, 2)
    far = Message(Kind.FORWARD, 0, 0, 4, 0, 4)
    assert first[0].sends == (near, skip, far)
    assert [m.source_stage for m in last[0].receives] == [3, 1, 0]
    assert [m.destination_stage for m in last[1].sends] == [3, 1, 0]
    assert [m.source_stage for m in first[1].receives] == [1, 2, 4]
    assert [m.source_stage for m in second[1].receives] == [2, 4]
    assert str(last[1].sends[2]) == "gradient of microbatch 0, stage 4 -> 0 (device 4 -> 0)"


@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_skips_block_no_schedule(name: str, policy: str) -> None:
    schedule = with_recompute(named_schedule(name, 5, 7), policy)
    stages = range(schedule.num_stages)
    flows = [(a, b) for a in stages for b in stages[a + 2 :]]
    programs = lower(schedule, flows)
    assert len(list(walk(programs))) == sum(map(len, schedule.programs))
    order = links(programs)
    assert len(order) == 5 * 4
    for (source, destination), sent in order.items():
        received = [
            message
            for step in programs[destination]
            for message in step.receives
            if message.source == source
        ]
        if SCHEDULES[name].stages_per_device == 1:
            assert received == list(sent)
        assert Counter(received) == Counter(sent)


def test_skips_between_stages_that_share_devices() -> None:
    """Stages 0 and 3 on one device, 1 and 2 on another: a link then carries several kinds."""
    schedule = Schedule(
        name="shared",
        programs=parse_programs("0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1\n1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1"),
        placement=((0,), (1,), (1,), (0,)),
        num_microbatches=2,
    )
    programs = lower(validate(schedule), [(0, 2), (0, 3), (1, 3)])
    assert len(list(walk(programs))) == 16
    down = [(m.source_stage, m.destination_stage) for m in links(programs)[0, 1]]
    assert down == [(0, 1), (0, 2), (0, 1), (0, 2), (3, 2), (3, 1), (3, 2), (3, 1)]


def test_a_split_backward_sends_skips_from_its_first_half() -> None:
    schedule = Schedule(
        name="split",
        programs=parse_programs("0F0 0I0 0W0\n1F0 1I0 1W0\n2F0 2I0 2W0"),
        placement=((0,), (1,), (2,)),
        num_microbatches=1,
    )
    programs = lower(validate(schedule), [(0, 2)])
    assert [[m.destination_stage for m in step.sends] for step in programs[2]] == [[], [1, 0], []]
    assert [[m.source_stage for m in step.receives] for step in programs[0]] == [[], [1, 2], []]
