"""`stagewise doctor`: in one process, and between workers; the exit code says whether to act."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import SECONDS, RunHere


def test_one_process_is_examined_by_default(run_here: RunHere) -> None:
    code, out, _ = run_here("doctor")
    assert code == 0
    assert "what to do" in out and "versions" in out and "links" not in out


@pytest.mark.timeout(300)
def test_two_workers_reach_each_other_and_a_low_limit_is_told(tmp_path: Path) -> None:
    command = f"ulimit -n 200; exec {sys.executable} -m stagewise doctor --devices 2 --json"
    ran = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 1, ran.stderr
    told = json.loads(ran.stdout)
    assert [(link["source"], link["target"]) for link in told["links"]] == [(0, 1), (1, 0)]
    assert all(0 < link["latency_seconds"] < 1 for link in told["links"])
    assert all(link["bytes_per_second"] > 1e6 for link in told["links"])
    assert len(told["facts"]) == len(told["clock_leads_seconds"]) == 2
    (must,) = (each for each in told["findings"] if each["verdict"] == "must be done")
    assert must["check"] == "open files" and must["remedy"] == "ulimit -n 1088"
    assert not told["ok"]
