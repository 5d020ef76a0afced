"""The live page: for this machine only, with what is new, until its run ends."""

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from stagewise.page.dashboard import HOST, PageServer, live_page
from stagewise.recording import LOG_FILE


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    pytest.importorskip("plotly")
    with PageServer(tmp_path) as serving:
        Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield serving
        serving.shutdown()


def ask(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    headers = {} if host is None else {"Host": host}
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_only_its_own_address_is_answered(server: PageServer) -> None:
    port = server.server_port
    assert server.server_address[0] == "127.0.0.1"
    for host in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        assert ask(port, "/", host)[0] == 403
    assert ask(port, "/", f"localhost:{port}")[0] == 200
    assert ask(port, "/../log.jsonl")[0] == ask(port, "/log.jsonl")[0] == 404


def test_news_are_what_the_run_has_written_since(server: PageServer, tmp_path: Path) -> None:
    port = server.server_port
    status, text = ask(port, "/")
    assert status == 200 and "the run has written nothing yet" in text
    found = re.search('data-version="(.+?)"', text)
    assert found is not None
    version = found[1]
    assert ask(port, f"/news?seen={version}") == (204, "")
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    status, text = ask(port, f"/news?seen={version}")
    news = json.loads(text)
    assert status == 200 and news["version"] != version
    assert news["figures"]["losses"]["data"][0]["y"] == [2.5]
    assert news["numbers"]["runs"][0]["log"] == [{"step": 1, "loss": 2.5}]
    assert "2.5000" in news["parts"]["summary"]
    assert ask(port, f"/news?seen={news['version']}")[0] == 204


def test_it_lives_as_long_as_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    with live_page(tmp_path):
        said = capfd.readouterr().err
        port = int(re.fullmatch(r"dashboard: http://127\.0\.0\.1:(\d+)/\n", said)[1])
        assert ask(port, "/")[0] == 200
    with pytest.raises(ConnectionError):
        ask(port, "/")
    with live_page(None):
        assert capfd.readouterr().err == ""
