"""Why another rank does not answer: who it is, and no cause that is not known."""

import pytest
from torch.distributed import HashStore

from stagewise.engine.transport import failure
from stagewise.engine.transport.failure import FailureBoard
from stagewise.engine.transport.peers import Peer
from stagewise.errors import PeerError


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "_PATIENCE_SECONDS", 0.1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError("nothing came"), r"nothing came.*none was told: rank 3 is alive but hangs"),
        (RuntimeError("Timed out waiting 5000ms"), "none was told: rank 3 is alive"),
        (ConnectionError("closed"), r"\(closed\).*rank 3 ended without a word"),
        (RuntimeError("reset by peer"), "the process of rank 3 ended without a word"),
    ],
)
def test_who_is_silent_is_named(error: Exception, words: str) -> None:
    peer = Peer(FailureBoard(HashStore(), 1), 1, 3)
    with pytest.raises(PeerError, match="rank 1 lost rank 3 while waiting for it.*" + words), peer:
        raise error


def test_what_a_rank_wrote_is_the_cause() -> None:
    store = HashStore()
    FailureBoard(store, 3).write("ValueError: no more")
    peer = Peer(FailureBoard(store, 1), 1)
    with pytest.raises(PeerError, match="First failure: rank 3: ValueError: no more"), peer:
        raise TimeoutError("nothing came")
