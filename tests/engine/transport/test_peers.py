"""Why another rank does not answer: who it is, and no cause that is not known."""

import threading

import pytest
from torch.distributed import HashStore

from stagewise.engine.transport.wires import peers
from stagewise.engine.transport.wires.peers import Peers
from stagewise.errors import PeerError


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PATIENCE_SECONDS", 0.1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            TimeoutError("nothing came"),
            r"nothing came.*none was reported: rank 3 is alive but hangs",
        ),
        (RuntimeError("Timed out waiting 5000ms"), "none was reported: rank 3 is alive"),
        (ConnectionError("closed"), r"\(closed\).*rank 3 ended without saying why"),
        (RuntimeError("reset by peer"), "the process of rank 3 ended without saying why"),
    ],
)
def test_who_is_silent_is_named(error: Exception, words: str) -> None:
    lost = pytest.raises(PeerError, match="rank 1 lost rank 3 while waiting for it.*" + words)
    with lost, Peers(1, HashStore()).named(3):
        raise error


def test_what_a_rank_wrote_is_the_cause() -> None:
    store = HashStore()
    Peers(3, store).tell("ValueError: no more")
    Peers(2, store).tell("a later one")
    lost = pytest.raises(PeerError, match="First failure: rank 3: ValueError: no more")
    with lost, Peers(1, store).named():
        raise TimeoutError("nothing came")


def test_a_store_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stopped, or the link to its host is cut."""
    monkeypatch.setattr(peers, "_STORE_SECONDS", 0.1)
    asked: list[str] = []

    class Stopped:
        def check(self, keys: list[str]) -> bool:
            asked.extend(keys)
            threading.Event().wait()
            return False

    found = Peers(1, Stopped())  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="rank 1 lost rank 0"), found.named(0):
        raise ConnectionError("closed")
    assert len(asked) == 1
    assert found.tell("ValueError: no more")
