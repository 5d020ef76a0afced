"""A signal ends all workers in bounded time."""

import os
import signal
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.training.workers import launch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_one_signal_ends_workers_that_do_not_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    """A cluster sends SIGTERM once; a closed terminal sends SIGHUP, and nobody can repeat it."""
    monkeypatch.setattr(launch, "PATIENCE_SECONDS", 1)
    before = [signal.getsignal(each) for each in (number, signal.SIGALRM)]
    with (
        pytest.raises(SignalException) as ended,
        launch._signals_touch(tmp_path / "stop"),
    ):
        os.kill(os.getpid(), number)
        assert (tmp_path / "stop").exists()
        time.sleep(20)  # the workers hang; the alarm interrupts this
    assert ended.value.sigval == signal.SIGKILL
    assert [signal.getsignal(each) for each in (number, signal.SIGALRM)] == before


@pytest.mark.parametrize(("code", "starts"), [(1, 2), (2, 1)])
def test_restarts_are_not_for_the_users_mistakes(tmp_path: Path, code: int, starts: int) -> None:
    """Each start took as long as importing torch, to find the same."""
    started = tmp_path / "started"
    config = launch.launch_config(2, str(tmp_path), signals="SIGQUIT", restarts=1)
    with launch.failures_end(MemoryKills()), pytest.raises(ChildFailedError):
        elastic_launch(config, "sh")("-c", f"echo >> {started}; sleep 0.2; exit {code}")
    assert len(started.read_text()) == 2 * starts


@pytest.mark.parametrize(("other", "seconds"), [("kill -STOP 0", 1), ("sleep 0.5", 30)])
def test_only_a_stopped_worker_is_not_waited_for_as_long_as_torch_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, seconds: int
) -> None:
    """Any other may be about to complete a checkpoint, and is given torchelastic's 30 seconds."""
    monkeypatch.setattr(launch, "ENDING_SECONDS", 1)
    patience = []
    plain = SubprocessContext._close

    def close(context: SubprocessContext, death_sig: signal.Signals, timeout: int = 30) -> None:
        patience.append(timeout)
        plain(context, death_sig, timeout)

    monkeypatch.setattr(SubprocessContext, "_close", close)
    config, ended = launch.launch_config(2, str(tmp_path), signals="SIGQUIT"), tmp_path / "ended"
    with launch.failures_end(MemoryKills()), pytest.raises(ChildFailedError) as failed:
        command = f"trap '' TERM; [ $RANK = 1 ] && {{ {other}; echo >> {ended}; exit 3; }}"
        elastic_launch(config, "sh")("-c", f"{command}; sleep 0.2; exit 1")
    assert patience[0] == seconds  # later, none is left
    assert ended.exists() == (seconds == 30)
    if not ended.exists():
        assert failed.value.failures[1].exitcode == -signal.SIGKILL
