"""Every code block of README and documentation runs; `make test-docs` runs the slow ones, too."""

import re
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


LINK = re.compile(r"(?<!`)\[[^\]]+\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    """On the site, too, which holds what is under docs/ alone."""
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        where = (page.parent / target).resolve()
        assert where.is_file(), f"{target} of {page}"
        assert page.name == "README.md" or ROOT / "docs" in where.parents, f"{target} of {page}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", where.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor[1:] in slugs, f"{target}{anchor} of {page}"
