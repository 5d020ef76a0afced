"""Every code block of README and documentation runs; `make test-docs` runs the slow ones, too."""

from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, blocks_of, run_page

RUNNING = [page for page in PAGES if any(not block.left_out for block in blocks_of(page))]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUNNING, ids=[str(page.relative_to(ROOT)) for page in RUNNING])
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert run_page(page, tmp_path) > 0


def test_what_is_not_run_has_a_reason() -> None:
    left = [
        (page.name, block.line)
        for page in PAGES
        for block in blocks_of(page)
        if "not run" in block.notes and len(block.notes["not run"]) < 10
    ]
    assert not left
