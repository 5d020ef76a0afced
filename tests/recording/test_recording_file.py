"""What a run writes is read back as it was, and nothing else is read at all."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewise.costs import LinkCost, StageCost
from stagewise.errors import RunError
from stagewise.planning import simulate
from stagewise.recording import (
    RECORDING_FILE,
    Clock,
    Phase,
    Recorder,
    Recording,
    StageMemory,
    read_run,
    recording_from_json,
    recording_to_json,
    step_of,
)
from stagewise.schedule import named_schedule


def recording(schedule: str = "1f1b", devices: int = 2, microbatches: int = 4) -> Recording:
    """A predicted recording, with a batch loaded before."""
    built = named_schedule(schedule, devices, microbatches)
    costs = [
        StageCost(forward_seconds=1, backward_seconds=2, recompute_seconds=1, output_bytes=3)
    ] * built.num_stages
    recorder = Recorder()
    simulate(built, costs, LinkCost(latency_seconds=1, overhead_seconds=1), recorder)
    recorder.ran.append((0, Phase.DATA, -2, 0, (1.5, 0.5)))
    step = step_of([recorder], [0.0], step=7, num_devices=built.num_devices, origin=-2)
    return Recording(
        num_devices=built.num_devices,
        clocks=(Clock(rank=0, host="here", device="cpu", offset_ns=-3, error_ns=4),),
        plans=({"schedule": schedule},),
        steps=(step,),
        memory=(
            StageMemory(
                stage=0,
                device=0,
                parameter_bytes=1,
                gradient_bytes=2,
                optimizer_bytes=3,
                live=((0, 5), (9, 6), (12, 0)),
            ),
        ),
        environment={"torch": "2"},
    )


@given(
    st.sampled_from(["gpipe", "1f1b", "zb_h1", "interleaved", "zb_v"]),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_a_recording_is_read_back_as_it_was(schedule: str, devices: int, multiple: int) -> None:
    written = recording(schedule, devices, multiple * devices)
    assert recording_from_json(recording_to_json(written)) == written


def test_events_count_from_the_begin_and_messages_have_both_ends() -> None:
    (step,) = recording(microbatches=1).steps
    found = {(event.device, str(event.what)): event for event in step.events}
    data = found[1, "data"]  # one process loads for both devices
    assert (data.start_ns, data.end_ns, data.cpu_ns) == (0, 2 * 10**9, 1_500_000_000)
    there, back = step.messages
    assert (there.sent_ns, there.released_ns, there.arrived_ns, there.used_ns) == (
        3 * 10**9,
        4 * 10**9,
        5 * 10**9,
        found[1, "1F0"].start_ns,
    )
    assert (there.num_bytes, back.message.source, back.message.destination) == (3, 1, 0)
    assert step.timeline.duration_seconds == 10


def test_clocks_are_aligned() -> None:
    ahead, behind = Recorder(), Recorder()
    first, second = named_schedule("1f1b", 2, 1).programs
    ahead.ran = [(0, first[0], 5.0, 6.0, None)]
    behind.ran = [(1, second[0], 103.5, 104.0, None)]
    step = step_of([ahead, behind], [0.0, -97.0], step=1, num_devices=2, origin=5.0)
    assert [event.start_ns for event in step.events] == [0, 1_500_000_000]


VALID = json.loads(recording_to_json(recording()))
WRONG: dict[str, Any] = {
    "format": "other",
    "version": 2,
    "num_devices": 1 << 40,
    "clocks": [{"rank": 9}],
    "plans": [3],
    "steps": {"a": 1},
    "memory": [{"stage": -1}],
    "environment": {"a": 1},
}


@pytest.mark.parametrize("name", WRONG)
def test_another_value_is_refused(name: str) -> None:
    with pytest.raises(RunError, match="not a recording"):
        recording_from_json(json.dumps({**VALID, name: WRONG[name]}))


@pytest.mark.parametrize(
    "changes",
    [
        {"what": "99999999999999999999F0"},
        {"what": "x"},
        {"device": 2},
        {"device": True},
        {"start_ns": -1},
        {"end_ns": 0.5},
        {"end_ns": 10**400},
        {"cpu_ns": "1"},
    ],
    ids=str,
)
def test_another_event_is_refused(changes: dict[str, Any]) -> None:
    step = VALID["steps"][0]
    broken = {**step, "events": [*step["events"][1:], {**step["events"][-1], **changes}]}
    with pytest.raises(RunError, match="not a recording"):
        recording_from_json(json.dumps({**VALID, "steps": [broken]}))


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "[" * 100_000, '{"format": NaN}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="not a recording"):
        recording_from_json(text)


def test_a_runs_folder_is_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"neither log\.jsonl nor recording\.json"):
        read_run(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_run(tmp_path).recording is None
    assert read_run(tmp_path).rows == ({"step": 1, "loss": 2.0},)
    (tmp_path / RECORDING_FILE).write_text(recording_to_json(recording()))
    assert read_run(tmp_path).recording == read_run(tmp_path / RECORDING_FILE).recording
    (tmp_path / RECORDING_FILE).write_text("nonsense")
    with pytest.raises(RunError, match=r"recording\.json: this is not a recording"):
        read_run(tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        read_run(tmp_path / "no")
