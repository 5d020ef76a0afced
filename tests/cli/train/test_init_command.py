"""The recipes that `stagewise init` writes train as they are."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import stagewise
from stagewise.cli.main import command_app
from stagewise.cli.train.init_command import init
from stagewise.cli.typed import DEFAULT_MICROBATCHES
from stagewise.errors import RecipeError
from stagewise.training.batches import TrainingBatches, validation_batches
from stagewise.training.recipe import build_model, load_recipe


def trained(path: Path) -> list[float]:
    """Three steps of the recipe, as it was written, through two stages."""
    recipe = load_recipe(path)
    model = build_model(recipe, seed=0)
    batches = TrainingBatches(recipe, seed=0)
    inputs, target = batches.first
    assert len(target) >= DEFAULT_MICROBATCHES  # so that the command that init prints runs
    plan = stagewise.plan(
        model,
        inputs,
        target=target,
        loss=recipe.loss,
        num_stages=2,
        num_microbatches=4,
        seconds=0.1,
    )
    pipe = stagewise.Pipeline(model, plan, loss=recipe.loss)
    optimizer = recipe.make_optimizer(list(pipe.parameters()))
    assert optimizer is not None and validation_batches(recipe)
    losses = []
    for _ in range(3):
        inputs, target = batches.next()
        losses.append(float(pipe.step(inputs, target=target)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_plain_recipe_trains(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    written = CliRunner().invoke(command_app("init"), ["plain", "--out", str(path)])
    assert written.exit_code == 0 and f"stagewise train {path} --stages 2" in written.output
    assert all(torch.tensor(trained(path)).isfinite())
    assert load_recipe(path).scheduler is not None


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    for what, out, words in (
        ("plain", "recipe.txt", "must end in .py"),
        ("no such model", "recipe.py", "neither a folder"),
        (str(tmp_path), "recipe.py", "no config.json"),
    ):
        with pytest.raises(RecipeError, match=words):
            init(what, tmp_path / out)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(RecipeError, match="BertModel"):
        init(str(tmp_path), tmp_path / "recipe.py")
    (tmp_path / "recipe.py").touch()
    with pytest.raises(RecipeError, match="exists"):
        init("plain", tmp_path / "recipe.py")
    with pytest.raises(RecipeError, match="cannot be written"):
        init("plain", tmp_path / "none" / "recipe.py")


def test_a_recipe_for_a_folder_of_transformers_trains(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {chr(code): code - 32 for code in range(32, 95)} | {"?": 63}
    model = tokenizers.models.WordLevel(words, unk_token="?")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="?").save_pretrained(
        folder
    )
    init(str(folder), tmp_path / "tune.py")
    assert all(torch.tensor(trained(tmp_path / "tune.py")).isfinite())


def test_a_recipe_for_a_model_of_torchvision_trains(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    init("squeezenet1_1", tmp_path / "see.py")
    assert all(torch.tensor(trained(tmp_path / "see.py")).isfinite())
