"""The pages that need Hugging Face or Lightning, and examples/pipeline_trainer.py, run."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from examples import pipeline_trainer
from tests.docs.blocks import ROOT, blocks_of, run_page

WRITES = {"fine-tuning": {"base", "adapters", "tuned"}}


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["trainer", "fine-tuning", "migrating"])
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that `make test` leaves out, since it has none of their packages."""
    path = ROOT / "docs" / f"{page}.md"
    theirs = {"transformers", "accelerate", "peft", "bitsandbytes", "lightning"}
    needing = [b for b in blocks_of(path) if theirs & {*b.notes.get("needs", "").split()}]
    missing = [block.line for block in needing if block.left_out]
    assert needing and not missing, "a package of make test-hf is not installed"
    monkeypatch.chdir(tmp_path)
    assert run_page(path, tmp_path) >= len(needing)
    assert WRITES.get(page, set()) <= {written.name for written in tmp_path.iterdir()}


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pipeline_trainer.main(steps=20) < 4.5
    assert (tmp_path / "runs/pipeline_trainer/model.safetensors").exists()
