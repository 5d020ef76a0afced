"""`stagewise report`: what a run's folder says, in the terminal and as JSON."""

import json
from pathlib import Path

import pytest

from stagewise.recording import Recording, save_recording
from tests.diagnosis.test_diagnosis import LINK, plan, recorded
from tests.recipes import RunHere


def written(run: Path) -> Recording:
    environment = {"command": "stagewise train x.py --plan p.json --steps 9", "samples": "64"}
    measured = recorded(plan(1, 2, 3, 4, link=LINK), data_seconds=1.0, environment=environment)
    save_recording(run, measured.recording)
    (run / "log.jsonl").write_text('{"step": 9, "loss": 2.5, "seconds": 0.5}\n')
    return measured.recording


def test_a_run_is_reported(
    tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recording = written(tmp_path)
    code, out, err = run_here("report", str(tmp_path))
    assert (code, err) == (0, "")
    for expected in (
        "step 9, loss 2.5000",
        "predicted",
        "measured: step 10, the median of 3",
        "idle: fill and drain",
        "idle: data loading",
        "8 microbatches in place of 4",
        "stagewise train x.py --steps 9",
        "advice: 4 microbatches on 2 devices",
    ):
        assert expected in out
    code, out, _ = run_here("report", str(tmp_path), "--json", "--trace", "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    found = json.loads(out)
    assert code == 0 and found["step"] == 10
    step = recording.usual_step
    assert step is not None
    assert found["bubble_fraction"] == step.timeline.bubble_fraction
    for idle, causes in zip(found["idle_ns"], found["idle_by_cause_ns"], strict=True):
        assert idle == sum(causes.values())
    assert found["replayed_seconds"] == pytest.approx(found["step_seconds"], rel=1e-3)
    assert found["what_would_help"][0]["seconds"] > 0


def test_a_run_without_a_recording(tmp_path: Path, run_here: RunHere) -> None:
    (tmp_path / "log.jsonl").write_text("")
    code, out, _ = run_here("report", str(tmp_path))
    assert code == 0 and "no step was recorded" in out
    assert json.loads(run_here("report", str(tmp_path), "--json")[1])["steps"] == 0
    code, _, err = run_here("report", str(tmp_path / "none"))
    assert code == 2 and "does not exist; give the folder that" in err


@pytest.mark.parametrize("damage", ["plan", "index", "nan"])
def test_a_step_is_shown_without_a_plan_that_cannot_be_read(
    damage: str, tmp_path: Path, run_here: RunHere
) -> None:
    written(tmp_path)
    path = tmp_path / "recording.json"
    fields = json.loads(path.read_text())
    if damage == "plan":
        fields["plans"] = [{"balance": 3}]
    elif damage == "index":
        fields["steps"][0]["events"] = []
        fields["steps"][1]["events"] = fields["steps"][1]["events"][:5]
        fields["steps"][2]["events"] = []
    else:
        fields["plans"][0]["cells"][0]["forward_seconds"] = float("nan")
    path.write_text(json.dumps(fields))
    code, out, err = run_here("report", str(tmp_path))
    assert (code, err) == (0, "") and "measured: step" in out


def test_runs_on_a_page(tmp_path: Path, run_here: RunHere) -> None:
    pytest.importorskip("plotly")
    html, first, second = (tmp_path / name for name in ("page.html", "a", "b"))
    for run in (first, second):
        run.mkdir()
        written(run)
    code, out, err = run_here("report", first, second, "--json", "--html", html)
    assert (code, err) == (0, f"wrote {html}: open it in a browser\n")
    numbers = html.read_text().partition('id="numbers">')[2].partition("</script>")[0]
    runs = json.loads(numbers)["runs"]
    assert [run["name"] for run in runs] == ["a", "b"]
    assert [run["report"] for run in runs] == json.loads(out)
    text = html.read_text()
    for expected in ("idle: fill and drain", "8 microbatches in place of 4", "advice: 4 micro"):
        assert text.count(expected) >= 2
    code, _, err = run_here("report", first, second)
    assert code == 2 and "add --html FILE, or give one run" in err
