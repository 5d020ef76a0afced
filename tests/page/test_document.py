"""The page is one file: numbers that can be read back, escaped texts, tables without scripts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.table import Table

from stagewise.errors import UsageError
from stagewise.page.document import check_html, document, write_html
from stagewise.page.page_contents import Page, Section, ShownStep
from stagewise.planning.simulate import simulate, unit_costs
from stagewise.schedule import named_schedule
from stagewise.timeline import Timeline

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def page() -> Page:
    pytest.importorskip("plotly")
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    steps = [
        ShownStep(name, simulate(named_schedule(name, 2, 4), unit_costs(2)))
        for name in ("1f1b", "gpipe")
    ]
    return Page(
        title=EVIL,
        summary={EVIL: EVIL},
        record={"what": EVIL, "number": 1 / 3},
        steps=[*steps, ShownStep(EVIL, steps[0].timeline)],
        sections=[Section(EVIL, [table, EVIL])],
        environment={EVIL: EVIL},
    )


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(v) for k, v in attrs if k in ("src", "href") or k.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def numbers_on(text: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text)
    assert found is not None
    return dict(json.loads(found[1]))


def test_numbers_are_read_back_exactly() -> None:
    shown = page()
    numbers = numbers_on(document(shown))
    steps = numbers.pop("steps")
    assert numbers == shown.record
    for written, step in zip(steps, shown.steps, strict=True):
        assert Timeline.from_records(written["num_devices"], written["spans"]) == step.timeline
        assert written["step_seconds"] == step.timeline.duration_seconds
        assert written["bubble_fraction"] == step.timeline.bubble_fraction


def test_untrusted_texts_stay_texts_and_nothing_is_loaded() -> None:
    text = document(page())
    found = Tags(text)
    assert found.tags.count("script") == 4 and "img" not in found.tags
    assert found.loaded == ["data:,"]  # the icon
    assert "".join(found.words).count(EVIL) >= 6
    assert text.count("'sha256-") == 2 and "default-src 'none'" in text


def test_tables_hold_what_the_pictures_show() -> None:
    words = "\n".join(Tags(document(page())).words)
    for expected in ("0F0", "1B3", "idle 1 s: 1F0 waited for 0F0 on device 0", "20.0%", "gpipe"):
        assert expected in words


def test_a_page_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    with pytest.raises(UsageError, match=r"is a folder; give a file to write"):
        check_html(tmp_path)
    with pytest.raises(UsageError, match=r"is in a folder that does not exist"):
        check_html(tmp_path / "none" / "page.html")
    target = tmp_path / "page.html"
    check_html(target)
    write_html(page(), target)
    assert [*tmp_path.iterdir()] == [target]


def test_without_plotly_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r"pip install 'stagewise\[page\]'"):
        check_html(Path("page.html"))
