"""A signal or a touched file asks to stop; a second Ctrl-C has its usual effect."""

import os
import signal
from pathlib import Path

import pytest

from stagewise.training.workers.stop import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    stop = StopRequest()
    with stop.listening():
        assert not stop.made
        os.kill(os.getpid(), number)
        assert stop.made
        for again in SIGNALS:  # as Slurm and torchrun both send one
            os.kill(os.getpid(), again)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_later_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagewise.training.workers.stop._ONE_REQUEST_SECONDS", 0.0)
    stop = StopRequest()
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # torch's launcher has its own
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert stop.made


def test_the_stop_file_is_a_request(tmp_path: Path) -> None:
    stop = StopRequest(stop_file=tmp_path / "stop")
    assert not stop.made
    (tmp_path / "stop").touch()
    assert stop.made
