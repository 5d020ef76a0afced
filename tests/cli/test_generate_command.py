"""`stagewise generate`: what it refuses, and with transformers the texts of the plain model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stagewise.checkpoints.sources import SINGLE
from stagewise.cli import generate_command
from tests.recipes import RunHere, write_recipe


def test_a_model_of_ones_own_is_refused_in_words(tmp_path: Path, run_here: RunHere) -> None:
    code, _, err = run_here("generate", "nowhere", "To be")
    assert code == 2 and "nowhere does not exist" in err
    recipe = write_recipe(tmp_path)
    assert run_here("train", recipe, "--devices", "1", "--steps", "1", "--out", "run")[0] == 0
    code, _, err = run_here("generate", "run", "To be")
    assert code == 2 and "the model of run is not one of transformers" in err
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    code, _, err = run_here("generate", "model", "To be")
    assert code == 2 and "model has no tokenizer: set tokenizer =" in err


def test_what_cannot_be_is_told_before_workers_start(
    tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "tokenizer.json"):
        Path(name).write_text("{}")
    save_file({f"{n}.{p}": torch.ones(1) for n in "ab" for p in ("weight", "bias")}, SINGLE)
    for spec, said in ((None, "pip install"), (tmp_path, "5 devices need a layer each, but")):
        monkeypatch.setattr(generate_command, "find_spec", lambda name, spec=spec: spec)
        code, _, err = run_here("generate", ".", "To be", "--devices", "5")
        assert code == 2 and said in err and "rank" not in err


def test_texts_are_the_plain_models_on_any_number_of_devices(
    tmp_path: Path, run_here: RunHere
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {chr(code): code - 32 for code in range(32, 126)} | {"<pad>": 94, "<eos>": 95}
    model = tokenizers.models.WordLevel(words, unk_token="<pad>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=95,
        pad_token_id=94,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config)
    for part in (plain, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.py").write_text(RECIPE)
    one = ("--devices", "1", "--microbatches", "2", "--steps", "1", "--out", "run")
    assert run_here("train", "recipe.py", *one)[0] == 0
    assert run_here("export", "run", "out")[0] == 0
    trained = transformers.LlamaForCausalLM.from_pretrained("out").eval()
    prompts = ["To be", "or"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = trained.generate(**batch, max_new_tokens=9, do_sample=False)
    expected = tokenizer.batch_decode(out, skip_special_tokens=True)
    for source, devices in (("run", "1"), ("run", "2"), ("out", "1")):
        more = ("--max-new-tokens", "9", "--devices", devices)
        code, out, err = run_here("generate", source, *prompts, *more)
        assert code == 0, err
        assert out.splitlines() == expected
    drawn = [run_here("generate", "out", "To", "--top-k", "9", "--seed", n)[1] for n in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


RECIPE = """
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from torch import nn
import stagewise

tokenizer = AutoTokenizer.from_pretrained("model")

def model():
    return LlamaForCausalLM.from_pretrained("model", use_cache=False)

def data(split):
    ids = torch.arange(64).reshape(4, 16)
    return [(stagewise.Arguments(input_ids=ids), ids.roll(-1, 1))] if split == "train" else None

def loss(output, target):
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)
"""
