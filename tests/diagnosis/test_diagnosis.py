"""A recorded step is replayed as it was, and with one thing changed as if that were true."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from stagewise.costs import FREE_LINK, CellCost, LinkCost, scaled
from stagewise.diagnosis import MeasuredSteps, advice_for, as_measured, what_would_help
from stagewise.diagnosis.again import command_for
from stagewise.planning import Plan, plan_from_costs, simulate
from stagewise.recording import Clock, Phase, Recorder, Recording, step_of

LINK = LinkCost(latency_seconds=0.002, overhead_seconds=0.001, seconds_per_byte=1e-6)


def cells(*seconds: float) -> tuple[CellCost, ...]:
    return tuple(
        CellCost(
            name=str(index),
            forward_seconds=each,
            backward_seconds=2 * each,
            output_bytes=1000,
            gradient_bytes=1000,
            activation_bytes=5000,
        )
        for index, each in enumerate(seconds)
    )


def recorded(
    planned: Plan,
    true: Plan | None = None,
    data_seconds: float = 0.0,
    environment: Mapping[str, str] | None = None,
) -> MeasuredSteps:
    """Steps that ran as `true` says, of a plan that had other costs."""
    true, devices = true or planned, range(planned.num_devices)
    recorder = Recorder()
    simulate(true.built_schedule, true.engine_costs, true.link, recorder)
    apart = [
        Recorder(
            ran=[(device, Phase.DATA, -data_seconds, 0.0, None)]
            + [row for row in recorder.ran if row[0] == device],
            sent=[row for row in recorder.sent if row[0].source == device],
            received=[row for row in recorder.received if row[0].destination == device],
        )
        for device in devices
    ]
    steps = tuple(
        step_of(apart, [data_seconds] * len(devices), step=step, num_devices=len(devices))
        for step in (9, 10, 11)
    )
    found = as_measured(
        Recording(
            num_devices=len(devices),
            clocks=tuple(
                Clock(rank=rank, host="a", device="cpu", offset_ns=0, error_ns=0)
                for rank in devices
            ),
            plans=(json.loads(planned.to_json()),),
            steps=steps,
            environment=environment or {},
        )
    )
    assert found is not None
    return found


def plan(*seconds: float, link: LinkCost = LINK, **wishes: object) -> Plan:
    given = {"num_devices": 2, "num_microbatches": 4, "schedule": "1f1b", **wishes}
    return plan_from_costs(cells(*seconds), link=link, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1", "interleaved"])
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_the_replay_takes_as_long_as_the_steps(schedule: str, recompute: str) -> None:
    planned = plan(1, 2, 3, 4, schedule=schedule, recompute=recompute)
    slower = replace(planned, cells=tuple(scaled(cell, seconds=1.5) for cell in planned.cells))
    found = recorded(planned, slower, data_seconds=0.5)
    assert found.step_seconds == pytest.approx(slower.timeline.duration_seconds + 0.5, rel=1e-8)
    assert found.around_seconds == pytest.approx(0.5, rel=1e-8)
    assert found.replayed_seconds == pytest.approx(found.step_seconds, rel=1e-8)
    assert found.plan.timeline.busy_seconds == pytest.approx(slower.timeline.busy_seconds, rel=1e-9)


def test_gains_are_those_of_the_true_costs() -> None:
    planned = plan(1, 1, 1, 1, recompute="always", link=replace(LINK, latency_seconds=0.5))
    true = replace(planned, balance=(3, 1))
    found = recorded(replace(true, cells=cells(2, 2, 2, 2)), true)
    now = true.timeline.duration_seconds
    by_change = {help.change.partition(" in place")[0]: help for help in what_would_help(found)}

    def check(change: str, other: Plan) -> None:
        gain = now - other.timeline.duration_seconds
        assert by_change[change].seconds == pytest.approx(gain, rel=2e-6), change
        assert by_change[change].share == pytest.approx(gain / now, rel=2e-6)

    check("messages that take no time", replace(true, link=FREE_LINK))
    check("no recomputation", replace(true, recompute="never"))
    check("cells per stage 2, 2", replace(true, balance=(2, 2)))
    half = tuple(scaled(cell, seconds=0.5, size=0.5) for cell in true.cells)
    check("8 microbatches", replace(true, num_microbatches=8, cells=half))
    check("schedule gpipe", replace(planned, schedule="gpipe"))
    assert "schedule interleaved, 2 stages on a device" in by_change
    gains = [help.seconds for help in what_would_help(found)]
    assert gains == sorted(gains, reverse=True)


def test_a_slow_device_is_found_by_its_pace() -> None:
    planned = plan(1, 1, link=FREE_LINK)
    fast, slow = planned.cells
    true = replace(planned, cells=(fast, scaled(slow, seconds=3)))
    (found,) = (h for h in what_would_help(recorded(planned, true)) if "pace" in h.change)
    gain = true.timeline.duration_seconds - planned.timeline.duration_seconds
    assert found.seconds == pytest.approx(gain, rel=2e-6)
    assert "device 1" in found.change and "3.00 times" in found.change
    assert not any("pace" in h.change for h in what_would_help(recorded(planned)))


def test_a_slow_device_stays_slow_when_cells_move() -> None:
    planned = plan(1, 1, 1, 1, link=FREE_LINK)
    first, second = planned.cells[:2], planned.cells[2:]
    slow = tuple(scaled(cell, seconds=2) for cell in second)
    true = replace(planned, cells=(*first, *slow))
    by_change = {help.change: help for help in what_would_help(recorded(planned, true))}
    other = by_change["schedule interleaved, 2 stages on a device"]
    moved = [
        scaled(cell, seconds=factor)
        for cell, factor in zip(cells(1, 1, 1, 1), (1, 2) * 2, strict=True)
    ]
    gain = true.timeline.duration_seconds
    gain -= replace(other.plan, cells=tuple(moved), link=FREE_LINK).timeline.duration_seconds
    assert other.seconds == pytest.approx(gain, rel=2e-6)


def test_twice_the_microbatches_needs_as_many_samples() -> None:
    changes = [
        h.change for h in what_would_help(recorded(plan(1, 1), environment={"samples": "7"}))
    ]
    assert not any("microbatches" in change for change in changes)


@pytest.mark.parametrize(
    ("about", "measured", "words"),
    [
        (
            "transfers",
            recorded(plan(1, 1, link=replace(LINK, latency_seconds=1))),
            "of the time that they compute",
        ),
        ("microbatches", recorded(plan(1, 1, link=FREE_LINK)), "try 8, plan("),
        ("slow stage", recorded(plan(1, 2, link=FREE_LINK)), "stage 1 takes 2.0 times"),
        (
            "slow stage",
            recorded(replace(plan(1, 1, 1, 1), balance=(3, 1))),
            "balance=(2, 2)",
        ),
        (
            "recomputation",
            recorded(plan(1, 1, recompute="always")),
            "of one microbatch while it is recomputed",
        ),
        (
            "BatchNorm",
            recorded(plan(1, 1), environment={"samples": "16", "batchnorm_layers": "3"}),
            "3 BatchNorm layers normalise over 4 samples",
        ),
        ("devices", recorded(plan(0.001, 1, link=FREE_LINK)), "1 device would take"),
        ("data", recorded(plan(1, 1), data_seconds=1.0), "for data"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_advice_has_its_number(about: str, measured: MeasuredSteps, words: str) -> None:
    told = {advice.about: advice.sentence for advice in advice_for(measured)}
    assert words in told[about]


def test_without_cause_there_is_no_advice() -> None:
    quiet = recorded(
        plan(1, 1, num_microbatches=16), environment={"batchnorm_layers": "2", "samples": "256"}
    )
    assert advice_for(quiet) == []


def test_a_stage_with_replicas_may_take_longer() -> None:
    made = plan(1, 2, link=FREE_LINK, num_devices=None, replicas=(1, 2))
    assert "slow stage" not in {advice.about for advice in advice_for(recorded(made))}
    slow = plan(1, 4, link=FREE_LINK, num_devices=None, replicas=(1, 2))
    told = {advice.about: advice.sentence for advice in advice_for(recorded(slow))}
    assert "stage 1 takes 2.0 times as long" in told["slow stage"]
    assert "(12 s for a microbatch, on 2 devices)" in told["slow stage"]


def test_a_command_keeps_what_is_not_of_the_plan() -> None:
    other = plan(1, 1, 1, 1, schedule="interleaved", recompute="always", num_microbatches=8)
    command = "stagewise train 'my recipe.py' --plan x.json --steps 5 --microbatches=4"
    assert command_for(command, other) == (
        "stagewise train 'my recipe.py' --steps 5 --devices 2 --microbatches 8 "
        "--schedule interleaved --recompute always"
    )
    assert command_for("", other, cut=True) == (
        "plan(..., num_devices=2, num_microbatches=8, schedule='interleaved', recompute='always', "
        "balance=(1, 1, 1, 1))"
    )


def test_a_recording_without_steps_or_of_fewer_microbatches_has_no_replay() -> None:
    whole = recorded(plan(1, 1)).recording
    assert as_measured(replace(whole, steps=())) is None
    fewer = json.loads(plan(1, 1, num_microbatches=5).to_json())
    assert as_measured(replace(whole, plans=(fewer,))) is None
