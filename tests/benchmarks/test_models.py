"""The table of unmodified models: its list, and the page that it is written to and read from."""

from pathlib import Path

from benchmarks.models import COLUMNS, markdown, rows_in
from benchmarks.unmodified import ENTRIES


def test_every_entry_has_a_name_of_its_own() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names) >= 60


def test_rows_of_a_page_stay_when_others_are_written(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = [
        {column: f"{name} {column}" for column in COLUMNS} | {"model": name, "note": ""}
        for name in ("a", "b")
    ]
    page = tmp_path / "models.md"
    assert rows_in(page) == {}
    page.write_text(markdown(rows, "a commit"))
    assert rows_in(page) == {row["model"]: row for row in rows}
