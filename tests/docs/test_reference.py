"""The reference shows every public name, with a docstring; `make docs` builds it from these."""

import inspect
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_surface import EXPORTS, PACKAGES

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "reference"
PUBLIC = {"stagewise": EXPORTS, **PACKAGES}


def test_every_public_package_has_a_page() -> None:
    shown = {
        line.removeprefix("::: ")
        for page in PAGES.glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    }
    assert set(PUBLIC) <= shown


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_documented(package: str) -> None:
    silent = []
    for name in PUBLIC[package]:
        value = getattr(import_module(package), name)
        members = inspect.getmembers(value) if inspect.isclass(value) else []
        silent += [name] if not inspect.getdoc(value) else []
        silent += [
            f"{name}.{member}"
            for member, found in members
            if inspect.isfunction(found)
            and not member.startswith("_")
            and found.__name__ == member  # not a lambda, the default of a field
            and found.__module__.startswith("stagewise")
            and not inspect.getdoc(found)
        ]
    assert silent == []


def test_every_extra_is_told_where_people_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text()
    assert [e for e in project["optional-dependencies"] if f"| `{e}` |" not in page] == []
