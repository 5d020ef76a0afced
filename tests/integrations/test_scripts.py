"""The scripts of docs/trainer.md and examples/pipeline_trainer.py run."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from examples import pipeline_trainer
from tests.docs.blocks import ROOT, run_page


def test_the_page_of_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / "docs" / "trainer.md", tmp_path) == 2


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pipeline_trainer.main(steps=20) < 4.5
    assert (tmp_path / "runs/pipeline_trainer/model.safetensors").exists()
