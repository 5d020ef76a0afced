"""A trace has a slice for every event and an arrow for every message, inside its slices."""

import json
from collections import Counter
from dataclasses import replace

from stagewise.report.chrome_trace import chrome_trace
from tests.diagnosis.test_diagnosis import plan, recorded


def test_every_event_is_a_slice_and_every_message_an_arrow() -> None:
    recording = recorded(plan(1, 2, num_microbatches=3), data_seconds=0.5).recording
    events = json.loads(chrome_trace(recording))["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    num_steps, instructions, messages = 3, 2 * 2 * 3, 2 * 3
    kinds = Counter((e["cat"], e["tid"]) for e in slices)
    for kind in ("measured", "predicted"):
        assert kinds[kind, 0] == num_steps * instructions
        assert kinds[kind, 2] == num_steps * 2
    assert kinds["measured", 1] == num_steps * 2  # loads data
    assert {e["args"]["step"] for e in slices} == {9, 10, 11}
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {f"device {d}, {kind}" for d in (0, 1) for kind in ("measured", "predicted")}
    ends = Counter(e["id"] for e in events if e["ph"] in "sf")
    assert set(ends.values()) == {2} and len(ends) == 2 * num_steps * messages
    assert {type(number) for number in ends} == {int}  # Perfetto passes over arrows with names
    for end in (e for e in events if e["ph"] in "sf"):
        assert any(
            (e["pid"], e["tid"]) == (end["pid"], end["tid"])
            and e["ts"] <= end["ts"] <= e["ts"] + e["dur"]
            for e in slices
        )


def test_without_a_plan_only_what_was_measured_is_there() -> None:
    recording = replace(recorded(plan(1, 2)).recording, plans=())
    events = json.loads(chrome_trace(recording))["traceEvents"]
    assert {e["cat"] for e in events if e["ph"] == "X"} == {"measured"}
