"""The tutorial notebook runs on a CPU in less than a minute, and shows pictures and tables.

`make test-notebook` installs what executes it.
"""

import time
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tutorial.ipynb"


def test_the_tutorial_runs() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)
    began = time.monotonic()
    nbclient.NotebookClient(book, timeout=60, kernel_name="python3").execute()
    assert time.monotonic() - began < 60
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    shown = [output["data"]["text/html"] for output in outputs if "data" in output]
    assert len(shown) == 6
    assert [("<svg" in html, "<table" in html) for html in shown] == [(True, False)] * 5 + [
        (False, True)
    ]
    assert "verdict" in shown[-1] and "FAILED" not in shown[-1]
