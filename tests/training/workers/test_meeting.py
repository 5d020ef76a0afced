"""Whoever does not come, or cannot be reached, is told in a sentence, in bounded time."""

import json
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from stagewise.errors import UsageError
from stagewise.training.workers import meeting
from stagewise.training.workers.meeting import store_of_all

LONG = timedelta(minutes=30)


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two ranks' environment, this one being rank 0, with short waits."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, seconds in {"PATIENCE": 0.6, "TOLD": 0.1, "CALL": 0.3}.items():
        monkeypatch.setattr(meeting, f"{name}_SECONDS", seconds)
    return told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_ADDR": ""}, "RANK and WORLD_SIZE are set, but not MASTER_ADDR: start workers"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "not MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a port"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
        ({"RANK": "x"}, "RANK='x' is not a number"),
        ({"RANK": "2"}, "RANK=2, but WORLD_SIZE=2; ranks are 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a number"),
        ({}, "rank 1 of 2 did not come to localhost:"),
        ({"MASTER_ADDR": "192.0.2.1"}, "has no address 192.0.2.1): start every rank"),
        ({"RANK": "1"}, "the store of rank 0 cannot be reached at MASTER_ADDR=localhost"),
        ({"RANK": "1", "MASTER_ADDR": "no-such-host.invalid"}, "check the address, the port"),
        ({"RANK": "1", "MASTER_ADDR": "192.0.2.1"}, "at MASTER_ADDR=192.0.2.1"),
    ],
)
def test_a_sentence_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    with pytest.raises(UsageError) as raised:
        store_of_all(LONG)
    assert said in str(raised.value)
    assert time.monotonic() - begun < 10


def test_who_is_waited_for_is_told_before_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        store_of_all(LONG)
    assert "rank 0 waits at localhost:" in (said := capsys.readouterr().err)
    assert "for rank 1 of 2, for at most another " in said


def test_a_port_in_use_is_named(place: dict[str, str]) -> None:
    with (
        socket.create_server(("localhost", int(place["MASTER_PORT"]))),
        pytest.raises(UsageError, match="is in use on this host"),
    ):
        store_of_all(LONG)


def test_what_is_no_store_is_told(monkeypatch: pytest.MonkeyPatch, place: dict[str, str]) -> None:
    """Such as a proxy, which answers for every address, or another program at the port."""
    monkeypatch.setenv("RANK", "1")
    with socket.create_server(("localhost", int(place["MASTER_PORT"]))) as other:
        thread = threading.Thread(target=lambda: [other.accept()[0].close() for _ in range(2)])
        thread.start()
        with pytest.raises(UsageError, match="is not the store of rank 0"):
            store_of_all(LONG)
        thread.join()


@pytest.mark.parametrize("reachable", [True, False])
def test_a_host_that_cannot_be_called_is_named_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, place: dict[str, str], reachable: bool
) -> None:
    """Rank 1 is on another host, whose name resolves to its own loopback there."""
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 20)
    listener = socket.create_server(("127.0.0.1", 0))
    other = ["other", "127.0.0.1", listener.getsockname()[1]]
    if not reachable:
        listener.close()

    def rank_1() -> None:
        client = dist.TCPStore("localhost", int(place["MASTER_PORT"]), is_master=False)
        start = client.get("stagewise/start").decode()
        store = dist.PrefixStore(start, client)  # type: ignore[attr-defined]
        client.set(f"{start}/1", json.dumps(["answer", *other]))
        store.set("called/1", "{}")

    thread = threading.Thread(target=rank_1)
    thread.start()
    try:
        if reachable:
            store_of_all(LONG)
        else:
            with pytest.raises(UsageError, match=r"rank 1 .other, 127.*another host's loopback"):
                store_of_all(LONG)
    finally:
        thread.join()
        listener.close()


def test_what_an_earlier_start_has_left_in_the_store_is_not_taken_for_this_one(
    monkeypatch: pytest.MonkeyPatch, place: dict[str, str]
) -> None:
    """A launcher serves one store for all starts; then rank 1 hears of rank 0's from before."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 20)
    served = dist.TCPStore("localhost", int(place["MASTER_PORT"]), is_master=True)
    here = [socket.gethostname(), "", 0]
    stale = [["old", *here], ["older", *here]]
    for key, value in {"0": stale[0], "1": stale[1], "all": stale}.items():
        served.set(f"before/{key}", json.dumps(value))
    served.set("stagewise/start", "before")

    def rank_0() -> None:
        while json.loads(served.get("before/1"))[0] == "older":
            time.sleep(0.01)  # until rank 1 has answered the wrong call
        served.set("now/0", json.dumps(stale[0]))
        served.set("stagewise/start", "now")
        served.set("now/all", json.dumps([stale[0], json.loads(served.get("now/1"))]))

    thread = threading.Thread(target=rank_0)
    thread.start()
    store = store_of_all(LONG)
    thread.join()
    store.set("key", "value")
    assert served.check(["now/key"])
