"""docs/fine-tuning.md with transformers and peft, which `make test` runs without (make test-hf)."""

from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, run_page

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(600),
]


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / "docs" / "fine-tuning.md", tmp_path) >= 5
    assert {"base", "adapters", "tuned"} <= {path.name for path in tmp_path.iterdir()}
