"""The page of a run while it trains, served to this machine's browsers only.

The server is a process of its own, which only reads the run's folder, and works for a twentieth of
the time at most: a page hardly disturbs training. It ends when its standard input does, so with the
process that started it, however that ends. It answers requests for its own address alone, since a
page elsewhere on the web may have its name resolved to this machine (DNS rebinding).
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from stagewise.errors import StagewiseError
from stagewise.page.document import document, figures_of, html_parts_of, numbers_of, plotly_script
from stagewise.page.page_contents import Page
from stagewise.page.run_page import run_page
from stagewise.recording import LOG_FILE, RECORDING_FILE, read_run

HOST = "127.0.0.1"
_PATIENCE = 10.0  # seconds for the server's process to end


@contextmanager
def live_page(run: Path | None) -> Iterator[None]:
    """Serve the page of the run in this folder while the body runs; None: do not."""
    if run is None:
        yield
        return
    plotly_script()  # raises UsageError without plotly
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()", str(run.absolute())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        address = server.stdout.readline().strip()
        print(f"dashboard: {address or 'could not be started'}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            server.stdin.close()
            try:
                server.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                server.kill()


def serve() -> None:
    """Serve the folder named on the command line until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the whole terminal: the run ends us
    with PageServer(Path(sys.argv[1])) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"http://{server.authority}/", flush=True)
        sys.stdin.read()
        server.shutdown()


class PageServer(ThreadingHTTPServer):
    """Serves the page of the run in `folder` on a free port of the loopback."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__((HOST, 0), _PageAnswers)
        self.folder = folder

    @property
    def authority(self) -> str:
        """Its address and port, as browsers name it."""
        return f"{HOST}:{self.server_port}"


class _PageAnswers(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        """Answer with the page, or with what is new in it."""
        folder, asked = self.server.folder, self.headers.get("Host", "")
        if asked.replace("localhost:", f"{HOST}:") != self.server.authority:
            self.send_error(HTTPStatus.FORBIDDEN, "this page is for its own address only")
            return
        url, version = urlsplit(self.path), _version(folder)
        if url.path == "/":
            self._answer("text/html", document(_page(folder), version))
        elif url.path != "/news":
            self.send_error(HTTPStatus.NOT_FOUND)
        elif parse_qs(url.query).get("seen") == [version]:
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()
        else:
            page = _page(folder)
            news = {
                "version": version,
                "parts": html_parts_of(page),
                "figures": figures_of(page),
                "numbers": numbers_of(page),
            }
            self._answer("application/json", json.dumps(news))

    def _answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the terminal is the run's."""


def _version(folder: Path) -> str:
    """Return what changes when the run has written something."""
    found = []
    for name in (LOG_FILE, RECORDING_FILE):
        try:
            status = (folder / name).stat()
            found.append(f"{status.st_size}.{status.st_mtime_ns}")
        except OSError:
            found.append("none")
    return "-".join(found)


def _page(folder: Path) -> Page:
    try:
        return run_page([read_run(folder)])
    except StagewiseError:
        waiting = {"waiting": "the run has written nothing yet"}
        return Page(title=f"stagewise train: {folder.name}", summary=waiting, record={})
