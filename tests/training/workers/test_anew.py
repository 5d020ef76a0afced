"""Others are lost while those that are left, and a new one, begin anew."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stagewise.errors import PeerError
from stagewise.training.workers import anew
from stagewise.training.workers.anew import Regained, StartedAnew, run_joined
from stagewise.training.workers.lost import REPLACES, LostWorkers
from stagewise.training.workers.survivors import Survivors


class Meeting:
    """Survivors that meet after these losses, one after the other; an error fails the meeting."""

    def __init__(self, *losses: dict[int, str] | PeerError) -> None:
        self.losses = [*losses]

    def newly_lost(self, error: PeerError) -> dict[int, str]:
        return {0: "SIGKILL"} if self.losses else {}

    def meet(self, error: PeerError | None = None) -> dict[int, str]:
        met = self.losses.pop(0)
        if isinstance(met, PeerError):
            raise met
        return met


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process; the state after step 3 is kept."""
    kept = SimpleNamespace(regained=lambda told: (((), SimpleNamespace(step=3)), [told]))
    monkeypatch.setattr(anew, "joined", lambda timeout, *, forms: nullcontext())
    monkeypatch.setattr(anew, "KeptStates", SimpleNamespace(here=lambda: kept))
    monkeypatch.setattr(Regained, "latest", None)


def body_of(*errors: Exception | None) -> tuple[Callable[[], None], list[str]]:
    """A body that ends so each time, and what was regained each time that it began."""
    begun, ends = list[str](), iter(errors)

    def body() -> None:
        latest = cast(Any, Regained.latest)
        begun.append("" if latest is None else f"{latest.interrupted.last_step}")
        if (error := next(ends)) is not None:
            raise error

    return body, begun


def test_one_that_is_lost_as_all_begin_anew_is_replaced_too() -> None:
    """As the group is formed, and as the pipeline is built."""
    meeting = Meeting({1: "SIGKILL"}, PeerError("no group"), {0: "SIGBUS"})
    first = StartedAnew(cast(Survivors, meeting), PeerError("lost"), (4, 9.0))
    body, begun = body_of(first, PeerError("lost while building"), None)
    run_joined(60, body)
    assert begun == ["", "4", "4"] and Regained.latest is not None
    assert Regained.latest.interrupted.why == (
        "rank 1 was lost (SIGKILL); rank 0 was lost (SIGBUS), and started anew with the state "
        "that it had kept"
    )


def test_what_no_loss_has_led_to_is_raised() -> None:
    first = StartedAnew(cast(Survivors, Meeting({1: "SIGKILL"})), PeerError("lost"), (4, 9.0))
    body, begun = body_of(first, PeerError("rank 1 failed: ValueError"))
    with pytest.raises(PeerError, match="ValueError"):
        run_joined(60, body)
    assert len(begun) == 2


def test_new_ones_go_on_where_all_others_were_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left who knows how far the run had come; their memory does."""
    monkeypatch.setenv(REPLACES, "1")
    lost = SimpleNamespace(replacements=2)
    monkeypatch.setattr(LostWorkers, "here", staticmethod(lambda: lost))
    monkeypatch.setattr(anew, "Survivors", lambda *_: Meeting({}))
    body, begun = body_of(None)
    run_joined(60, body)
    assert begun == ["3"]
