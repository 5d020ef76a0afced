"""A rank without progress raises an alarm, which every rank's watchdog answers."""

import contextlib
import io
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from stagewise.engine.watch.now import Now
from stagewise.engine.watch.watchdog import (
    FAILURE,
    HANGS_EXIT_CODE,
    WAITS,
    Watchdog,
)
from stagewise.schedule import Instruction, Kind, Message

SECONDS = 20
GRADIENT = Message(Kind.BACKWARD, 0, 1, 0, source=1, destination=0)


def waiting_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@contextlib.contextmanager
def watched(nows: list[Now], store: HashStore, timeout: float = 0.4) -> Iterator[None]:
    """A watchdog on every rank."""
    every = len(nows)
    dogs = [
        Watchdog(rank, every, store, timedelta(seconds=timeout), now)
        for rank, now in enumerate(nows)
    ]
    try:
        yield
    finally:
        for dog in dogs:
            dog.stop()


def test_the_rank_that_computes_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    waits = Now(call="step", instruction=Instruction(0, Kind.BACKWARD, 0), awaits=GRADIENT)
    hangs = Now(call="step", instruction=Instruction(1, Kind.FORWARD, 0))
    store = HashStore()
    with watched([waits, hangs], store):
        assert waiting_for(lambda: store.check([WAITS]))
    assert "rank 1" in store.get(WAITS).decode()
    assert "is in 1F0, in step" in store.get(WAITS).decode()
    printed = capsys.readouterr().err
    assert "waits for the gradient of microbatch 0" in printed
    assert "-> rank 1" in printed
    assert "-> rank 0" not in printed


def test_a_rank_between_calls_answers_and_raises_no_alarm() -> None:
    store = HashStore()
    with watched([Now(), Now()], store):
        assert not waiting_for_no_more_than(0.6, lambda: store.check(["stagewise/alarm/0"]))
    with watched([Now(call="step", awaits=1), Now()], store):
        assert waiting_for(lambda: store.check([WAITS]))
    assert "is between calls" in store.get(WAITS).decode()


def test_long_computing_is_no_alarm_while_nobody_waits() -> None:
    store, busy = HashStore(), Now(call="step", instruction=Instruction(0, Kind.FORWARD, 0))
    with watched([busy, busy], store):
        assert not waiting_for_no_more_than(0.6, lambda: store.check(["stagewise/alarm/0"]))


def test_progress_keeps_it_quiet() -> None:
    now, store = Now(call="step", awaits=1), HashStore()
    with watched([now], store):
        for _ in range(30):
            now.count += 1
            time.sleep(0.02)
        assert not store.check(["stagewise/alarm/0"])


def test_a_silent_rank_is_waited_for_only_briefly() -> None:
    store = HashStore()
    dog = Watchdog(0, 2, store, timedelta(seconds=0.4), Now(call="step", awaits=1))
    try:
        assert waiting_for(lambda: store.check([WAITS]))
    finally:
        dog.stop()
    assert "rank 1 does not answer" in store.get(WAITS).decode()


def test_a_rank_that_hangs_after_a_failure_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("stagewise.engine.watch.watchdog.os._exit", ended.append)
    store, stderr = HashStore(), io.StringIO()
    with contextlib.redirect_stderr(stderr), watched([Now(call="step"), Now()], store):
        store.set(FAILURE, "rank 1: ValueError: no more")
        assert waiting_for(lambda: bool(ended))
    assert set(ended) == {HANGS_EXIT_CODE}
    assert "the run has failed (rank 1: ValueError: no more)" in stderr.getvalue()


def test_a_rank_that_went_on_just_as_another_failed_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was taken for one that had survived the failure: all that a look sees is both."""
    ended: list[int] = []
    monkeypatch.setattr("stagewise.engine.watch.watchdog.os._exit", ended.append)
    now, store = Now(call="step"), HashStore()
    with watched([now], store):
        now.count += 1
        store.set(FAILURE, "rank 1: ValueError: cannot gather")
        assert waiting_for(lambda: bool(ended))


def test_a_failure_of_an_earlier_run_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("stagewise.engine.watch.watchdog.os._exit", ended.append)
    store = HashStore()
    store.set(FAILURE, "rank 1: ValueError: long ago")
    with watched([Now(call="step", awaits=1), Now()], store):
        assert waiting_for(lambda: store.check([WAITS]))
    assert not ended


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of processes that would have been ended, after 0.2 s more than the timeout."""
    codes: list[int] = []
    monkeypatch.setattr("stagewise.engine.watch.watchdog.os._exit", codes.append)
    monkeypatch.setattr("stagewise.engine.watch.watchdog._GRACE_SECONDS", 0.2)
    return codes


def test_ranks_that_nothing_ends_end_themselves(
    ended: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Also the one that is waited for, although it is in no call; torchrun hears who it was."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    aborted, store, stderr = threading.Event(), HashStore(), io.StringIO()
    now = Now(call="step", kind="step", step=7, awaits=1)
    dog = Watchdog(0, 2, store, timedelta(seconds=0.4), now, abort=aborted.set)
    other = Watchdog(1, 2, store, timedelta(seconds=0.4), Now(step=6))
    with contextlib.redirect_stderr(stderr):
        try:
            assert waiting_for(lambda: "so this process is ended" in stderr.getvalue())
        finally:
            dog.stop(), other.stop()
    assert set(ended) == {HANGS_EXIT_CODE} and aborted.is_set()
    printed = stderr.getvalue()
    assert "waits for rank 1, in step 7, for " in printed
    assert "the run is ended: rank 1 (" in printed
    assert "is between calls (after step 6)" in printed
    assert "rank 1 (" in (tmp_path / "error.json").read_text()


class StoppedStore:
    """A store whose process is stopped, after the first question."""

    def __init__(self) -> None:
        self._num_asked, self._never = 0, threading.Event()

    def clone(self) -> "StoppedStore":
        return self

    def set_timeout(self, timeout: timedelta) -> None: ...

    def check(self, keys: list[str]) -> bool:
        self._num_asked += 1
        return self._num_asked > 1 and self._never.wait()

    def compare_set(self, *_: str) -> None:
        self._never.wait()


def test_a_rank_without_a_store_tells_and_ends_too(
    ended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    now = Now(call="step", kind="step", step=7, awaits=0)
    dog = Watchdog(1, 2, StoppedStore(), timedelta(seconds=0.4), now)  # type: ignore[arg-type]
    try:
        assert waiting_for(lambda: bool(ended))
    finally:
        dog.stop()
    assert "rank 1 (" in (printed := capsys.readouterr().err)
    assert "waits for rank 0, in step 7" in printed
    assert "store does not answer (no answer within 0.1 s)" in printed


def waiting_for_no_more_than(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_what_held_a_rank_up_is_forgotten_when_it_goes_on() -> None:
    """It would be told as the cause of a later time-out."""
    now, store = Now(call="step", awaits=1), HashStore()
    with watched([now, Now()], store):
        assert waiting_for(lambda: store.check([WAITS]))
        now.count += 1
        assert waiting_for(lambda: store.get(WAITS) == b"")


def test_a_failure_that_was_survived_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("stagewise.engine.watch.watchdog.os._exit", ended.append)
    now, store = Now(call="step"), HashStore()
    with watched([now], store):
        now.call = ""
        store.set(FAILURE, "rank 1: ValueError: caught by the user")
        time.sleep(0.2)  # a look
        now.count, now.call, now.awaits = 1, "step", 0
        assert waiting_for(lambda: store.check([WAITS]))
    assert not ended


class Late(HashStore):
    """A store that is late for a while, as on a host with far too much to do."""

    num_late = 0

    def clone(self) -> "Late":
        return self

    def check(self, keys: list[str]) -> bool:
        if self.num_late:
            self.num_late -= 1
            raise RuntimeError("late")
        return super().check(keys)


def test_a_store_that_was_late_is_asked_again() -> None:
    store, now = Late(), Now(call="step", awaits=1)
    with watched([now], store):
        store.num_late = 2  # it is given up at the third in a row
        assert waiting_for(lambda: not store.num_late and store.check([WAITS]))


def test_what_the_watchdog_compares_keeps_no_cell_alive() -> None:
    """It kept the last one of a plan that was tried, with weights that are another rank's."""

    class Layer:
        name = "layers.3"

    now, layer = Now(), Layer()
    now.cell, gone = layer, weakref.ref(layer)
    state = now.state()
    assert "layers.3" in state
    now.end()
    del layer
    assert gone() is None and state != now.state()
