"""Every nanosecond of idle time has one cause."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewise.costs import CellCost, LinkCost
from stagewise.planning import Plan, simulate
from stagewise.planning.bubble import bubble_causes
from stagewise.recording import (
    Phase,
    RecordedEvent,
    RecordedMessage,
    RecordedStep,
    Recorder,
    step_of,
)
from stagewise.recording.causes import Cause, IdleTime, idle_time
from stagewise.schedule import SCHEDULES, Instruction, Kind, Message
from tests.schedules import stages_on

MS = 1_000_000
counts = st.integers(1, 50)


def check_sums(found: IdleTime) -> None:
    for device, idle in enumerate(found.idle_ns):
        assert sum(found.by_cause[device].values()) == idle >= 0
        waits = sorted((w.start_ns, w.end_ns) for w in found.waits if w.device == device)
        assert all(start < end for start, end in waits)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(waits))
    assert sum(found.total.values()) == sum(found.idle_ns)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    name, devices = draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(1, 4))
    stages = stages_on(name, devices)
    cells = [
        CellCost(
            name=str(stage),
            forward_seconds=draw(counts) / 1000,
            backward_seconds=draw(counts) / 500,
            output_bytes=draw(counts),
        )
        for stage in range(stages)
    ]
    link = LinkCost(
        latency_seconds=draw(counts) / 1000,
        seconds_per_byte=1e-3,
        overhead_seconds=draw(counts) / 1000,
    )
    return Plan(
        balance=(1,) * stages,
        schedule=name,
        num_microbatches=devices * draw(st.integers(1, 3)),
        recompute=draw(st.sampled_from(["never", "always"])),
        cells=tuple(cells),
        link=draw(st.sampled_from([LinkCost(), link])),
    )


def predicted(plan: Plan) -> RecordedStep:
    recorder = Recorder()
    simulate(plan.built_schedule, plan.engine_costs, plan.link, recorder)
    return step_of([recorder], [0.0], step=0, num_devices=plan.num_devices)


@given(plans())
def test_a_predictions_causes_are_its_idle_time(plan: Plan) -> None:
    found = idle_time(predicted(plan))
    check_sums(found)
    total = sum(found.window_ns)
    assert sum(found.idle_ns) / total == pytest.approx(plan.timeline.bubble_fraction)
    assert set(found.window_ns) == {round(plan.timeline.duration_seconds * 1e9)}
    if plan.link == LinkCost():
        causes = bubble_causes(plan)
        shares = {cause: ns / total for cause, ns in found.total.items() if ns}
        expected = {
            Cause.FILL_AND_DRAIN: causes.fill_and_drain,
            Cause.UNEQUAL_STAGES: causes.imbalance,
        }
        for cause, share in expected.items():
            assert shares.pop(cause, 0) == pytest.approx(share, abs=1e-6)
        assert not shares


times = st.integers(0, 100)
instructions = st.builds(
    Instruction, st.integers(0, 2), st.sampled_from(list(Kind)), st.integers(0, 2)
)


@st.composite
def steps(draw: st.DrawFn) -> RecordedStep:
    """Steps that no executor made: events overlap, messages arrive before they are sent."""

    def event() -> RecordedEvent:
        start, seconds, cpu = draw(times), draw(times), st.none() | times
        return RecordedEvent(
            device=draw(st.integers(0, 2)),
            what=draw(instructions | st.sampled_from(list(Phase))),
            start_ns=start,
            end_ns=start + seconds,
            cpu_ns=draw(cpu),
            cpu_before_ns=draw(cpu),
        )

    def message() -> RecordedMessage:
        stages, streams = st.integers(0, 2), st.sampled_from([Kind.FORWARD, Kind.BACKWARD])
        return RecordedMessage(
            message=Message(
                draw(streams),
                *(draw(stages) for _ in range(5)),
            ),
            num_bytes=1,
            sent_ns=draw(times),
            released_ns=draw(times),
            arrived_ns=draw(times),
            used_ns=draw(times),
            awaited_ns=draw(st.none() | times),
        )

    return RecordedStep(
        step=1,
        num_devices=3,
        plan=0,
        events=tuple(event() for _ in range(draw(st.integers(0, 12)))),
        messages=tuple(message() for _ in range(draw(st.integers(0, 8)))),
    )


@given(steps(), st.booleans())
def test_the_causes_of_any_step_add_up(step: RecordedStep, takes_turns: bool) -> None:
    check_sums(idle_time(step, takes_turns=takes_turns))


def event(device: int, what: str, start: int, end: int, **known: int) -> RecordedEvent:
    return RecordedEvent(
        device=device,
        what=Phase(what) if what in tuple(Phase) else Instruction.parse(what),
        start_ns=start,
        end_ns=end,
        **known,
    )


def test_each_cause_where_it_is() -> None:
    """Rank 0 loads data for long; rank 1 waits for it, then for a message, then for a core."""
    message = RecordedMessage(
        message=Message(Kind.FORWARD, 0, 0, 1, 0, 1),
        num_bytes=4,
        sent_ns=70,
        released_ns=72,
        awaited_ns=45,
        arrived_ns=80,
        used_ns=83,
    )
    step = RecordedStep(
        step=1,
        num_devices=2,
        plan=0,
        events=(
            event(0, "data", 0, 30),
            event(0, "agree", 30, 40),
            event(0, "0F0", 50, 70, cpu_before_ns=4),
            event(0, "reduce", 72, 100),
            event(0, "optimizer", 100, 110),
            event(1, "data", 0, 10),
            event(1, "agree", 10, 41),
            event(1, "1F0", 83, 95, cpu_ns=5, cpu_before_ns=9),
            event(1, "reduce", 95, 100),
            event(1, "optimizer", 100, 106),
        ),
        messages=(message,),
    )
    found = idle_time(step)
    check_sums(found)
    first, second = ({c: ns for c, ns in own.items() if ns} for own in found.by_cause)
    assert first == {
        Cause.DATA: 30,
        Cause.OVERHEAD: 10 + 4 + 3,  # agrees; gets the instruction going; rank 1's
        Cause.HOST: 6,
        Cause.TRANSFERS: 2 + 8,  # until the message is out of its hands, and there
        Cause.FILL_AND_DRAIN: 12,  # rank 1 still computes
        Cause.REDUCTION: 5,
    }
    assert second == {
        Cause.DATA: 10 + 20,  # its own, and rank 0's
        Cause.OVERHEAD: 11 + 4 + 4 + 3,  # agrees; before it awaits; rank 0's; after the arrival
        Cause.HOST: 1,  # rank 0's
        Cause.FILL_AND_DRAIN: 12,  # rank 0 computes
        Cause.UNEQUAL_STAGES: 8,  # and has 8 more to compute
        Cause.TRANSFERS: 10,
        Cause.REDUCTION: 5,
    }
    assert found.lost_ns == (0, 7) and found.update_ns == (10, 6)
    assert {w.device_awaited for w in found.waits if w.device == 1} == {None, 0}
