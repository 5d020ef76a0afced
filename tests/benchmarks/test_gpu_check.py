"""The script that checks GPUs: it runs without one, no check stops the next, errors are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import exact
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Subject
from benchmarks.gpu_check.supervise import Ended, Row, outcome
from stagewise.engine.stage.randomness import CellRandomness

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=110,
        cwd=ROOT,
    )


def test_every_check_runs_on_a_cpu(tmp_path: Path) -> None:
    done = python("-m", "benchmarks.gpu_check", "--dry", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    ended = {row["check"]: row["outcome"] for row in rows if "outcome" in row}
    assert [*ended] == [*command.CHECKS]
    skipped = {name for name, how in ended.items() if how == "skipped, needs a GPU"}
    assert {how for name, how in ended.items() if name not in skipped} == {"ok"}
    assert skipped == {"waits", "queues", "graphs"}
    assert done.stdout.splitlines()[-len(ended)].split() == ["env", *_seconds(rows), "ok"]


def _seconds(rows: list[Row]) -> list[str]:
    return [f"{row['seconds']:.1f}" for row in rows if "outcome" in row and row["check"] == "env"]


@pytest.mark.filterwarnings("ignore::stagewise.errors.ExactnessWarning")  # which says so, too
@pytest.mark.parametrize("broken", [False, True])
def test_a_broken_engine_is_found(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that nobody seeds draw other masks when the order of instructions changes."""
    if broken:
        monkeypatch.setattr(CellRandomness, "enter_cell", lambda self, cell, microbatch: None)
    monkeypatch.setattr(exact, "WAYS", {"2 stages": (2, {})})
    rows: list[Row] = []
    exact._same_bits(
        Subject(Machine.here(dry=True), "Transformer"),
        False,
        lambda what, **figures: rows.append({"what": what, **figures}),
    )
    what = "Transformer, default kernels"
    assert outcome("ok", rows) == (f"failed: {what}" if broken else "ok")


@pytest.mark.parametrize(
    ("how", "code"), [("ok", 0), ("failed: bits", 1), ("late: not done within 9 s", 1)]
)
def test_what_does_not_hold_is_the_exit_code(
    how: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_choose_start_method", lambda: None)
    monkeypatch.setattr(command, "ENVIRONMENT", {})
    monkeypatch.setattr(command, "run_all", lambda *_: [Ended("exact", how, 1.0)])
    assert command.main(["--dry", "--only", "exact"]) == code
    assert capsys.readouterr().out.splitlines()[-1] == f"exact            1.0  {how}"


BAD_CHECKS = """
import multiprocessing, os, signal
from benchmarks.gpu_check.supervise import Check, Skipped, run_all, table

def hangs(say):
    if os.fork() == 0:
        signal.pause()  # a process of its own, which must not stay either
    say("before", ok=True)
    signal.pause()

def dies(say):
    os._exit(3)

def raises(say):
    raise ValueError("as it may\\nhappen")

def differs(say):
    say("bits", ok=False)
    say("speed", aim=False)

def slow(say):
    say("speed", aim=False)

def cannot(say):
    raise Skipped("needs a GPU")

multiprocessing.set_start_method("fork")
checks = [Check(f.__name__, f, 60.0) for f in (dies, raises, differs, slow, cannot)]
ended = run_all([Check("hangs", hangs, 0.5), *checks], 100.0, lambda row: None)
print(table([*ended, *run_all(checks[-1:], 0.1, lambda row: None)]))
"""


def test_no_check_stops_the_next() -> None:
    done = python("-c", BAD_CHECKS)
    assert [[*line[:12].split(), line[22:]] for line in done.stdout.splitlines()[1:]] == [
        ["hangs", "late: not done within 0.5 s"],
        ["dies", "died: exit code 3"],
        ["raises", "error: ValueError: as it may ... happen"],
        ["differs", "failed: bits"],
        ["slow", "ok, but short of the aim: speed"],
        ["cannot", "skipped, needs a GPU"],
        ["cannot", "skipped, no time left"],
    ], done.stderr
