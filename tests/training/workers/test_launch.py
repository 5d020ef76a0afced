"""A signal ends all workers in bounded time."""

import os
import signal
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

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
