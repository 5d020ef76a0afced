"""Where a command runs: a process per device, or one for all that share an accelerator."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stagewise.cli.main import app
from stagewise.cli.typed import NumDevices, num_devices
from stagewise.cli.workers import report_errors_once, run_in_workers
from stagewise.engine.transport import processes
from stagewise.training.workers import launch, lifeline
from stagewise.training.workers.stop import stop_request
from tests.recipes import log_of, write_recipe


@pytest.mark.parametrize(
    ("accelerators", "workers", "launched", "said"),
    [
        (0, 1, False, ""),
        (0, 2, True, ""),
        (1, 1, False, "0 on cuda:0"),
        (1, 2, False, "0 on cuda:0, 1 on cuda:0"),
        (2, 2, True, ""),
        (2, 4, False, "0 on cuda:0, 1 on cuda:0, 2 on cuda:1, 3 on cuda:1"),
        (2, 3, False, "0 on cuda:0, 1 on cuda:0, 2 on cuda:1"),
        (4, 1, False, "0 on cuda:0"),
        (1, num_devices("cpu,cpu"), True, ""),
        (2, num_devices("cuda:1,cuda:0"), True, ""),
        (2, num_devices("cuda:1,cpu"), False, "0 on cuda:1, 1 on cpu"),
    ],
)
def test_workers_that_would_share_an_accelerator_are_one_process(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    accelerators: int,
    workers: int,
    launched: bool,
    said: str,
) -> None:
    gpu = torch.device("cuda") if accelerators else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: accelerators)
    monkeypatch.delenv("RANK", raising=False)
    ran = []
    monkeypatch.setattr(launch, "launch", lambda number, words, _: ran.append((number, words)))
    checks: list[None] = []
    run_in_workers(
        workers, ["x"], before=lambda: checks.append(None), body=lambda: ran.append("here")
    )  # type: ignore[arg-type]
    assert ran == [(workers, ["x"]) if launched else "here"]
    assert len(checks) == (launched or isinstance(workers, NumDevices)), "before anything is said"
    err = capsys.readouterr().err
    assert err == (f"one process runs all devices of the plan: {said}\n" if said else "")


def test_two_stages_train_on_the_only_accelerator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the losses of a machine without any. The CPU stands for the accelerator."""
    recipe = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    more = ["--steps", "3", "--microbatches", "4", "--validate-every", "0"]
    assert CliRunner().invoke(app, ["train", str(recipe), "--stages", "1", *more]).exit_code == 0
    monkeypatch.setattr(processes, "accelerators", lambda: [torch.device("cpu")])
    ran = CliRunner().invoke(app, ["train", str(recipe), "--stages", "2", *more])
    assert (ran.exit_code, ran.exception) == (0, None)
    assert "all devices of the plan: 0 on cpu, 1 on cpu" in ran.stderr
    assert "stage 1:" in ran.stdout and "peak activations, all devices" in ran.stdout
    assert log_of(tmp_path / "runs/tiny-2") == log_of(tmp_path / "runs/tiny")


@pytest.mark.parametrize("ours", [True, False])
def test_a_worker_stops_when_its_launcher_has_died(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ours: bool
) -> None:
    """Under torchrun too, which tells its workers neither its process nor a file to watch."""
    folder = tmp_path / "launcher's"
    folder.mkdir()
    told = {"RANK": "0", "WORLD_SIZE": "2"}
    if ours:
        told |= {"STAGEWISE_STOP_FILE": str(folder / "stop"), "STAGEWISE_LAUNCHER": "17"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lifeline, "_have_death_signalled", lambda: None)
    monkeypatch.setattr(lifeline.Lifeline, "_watch", lambda self: None)  # which would end pytest
    monkeypatch.setattr("os.getppid", lambda: 17)
    with report_errors_once() as found:
        stop = stop_request(found)
        assert not stop.made
        monkeypatch.setattr("os.getppid", lambda: 1)
        assert stop.made
    assert folder.exists() != ours
