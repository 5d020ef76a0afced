"""Of several workers' failures the first cause is reported; a signal ends all in bounded time."""

import os
import signal
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from stagewise.engine.watch.watchdog import HANGS_EXIT_CODE
from stagewise.training.workers import launch
from stagewise.training.workers.launch import _first_cause


def failure(rank: int, exit_code: int, text: str, when: int) -> ProcessFailure:
    found = ProcessFailure(local_rank=rank, pid=rank, exitcode=exit_code, error_file="none")
    found.timestamp = when
    if text:
        found.message = {"message": text, "extraInfo": {"py_callstack": ""}}  # type: ignore[assignment]
    return found


WAITED = "PeerError: rank 0 lost rank 1: rank 1 is in 1F3"


@pytest.mark.parametrize(
    ("others", "reported"),
    [
        ((HANGS_EXIT_CODE, "", 1), "rank 0 failed: " + WAITED),
        ((-signal.SIGTERM, "", 1), "rank 0 failed: " + WAITED),
        ((1, "ValueError: no more", 9), "rank 1 failed: ValueError: no more"),
        ((-signal.SIGKILL, "", 9), "rank 1 failed: Signal 9"),
    ],
)
def test_the_cause_is_reported_not_its_consequences(
    others: tuple[int, str, int], reported: str
) -> None:
    failures = {0: failure(0, 1, WAITED, 5), 1: failure(1, *others)}
    assert reported in str(_first_cause(failures))


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
