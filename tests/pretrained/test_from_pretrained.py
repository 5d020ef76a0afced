"""Folders of Hugging Face into pipelines and back; needs transformers and peft (make test-hf)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from tests.harness import Pools

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers and peft
    pytest.mark.timeout(600),
]

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "dtype": torch.float64,
    "use_cache": False,
}


def folder_of(tmp: Path, *, tied: bool = True) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).double()
    model.save_pretrained(str(tmp / "base"), max_shard_size="20KB")
    return tmp / "base"


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def lora() -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def plain_adapters(base: Path, out: Path) -> tuple[nn.Module, Path]:
    """PEFT's own model, whose adapters are not zero, and its folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(base))
    torch.manual_seed(1)
    made = peft.get_peft_model(model, lora())
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(str(out))
    return made.train(), out


def trained(base: str, adapters: Any, out: str) -> tuple[list[float], int]:
    """Three steps from the folders; the losses, and the number of elements here."""
    pipe = stagewise.from_pretrained(base, batch(), adapters=adapters, num_microbatches=2)
    optimizer = torch.optim.SGD([p for p in pipe.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(float(pipe.step(**batch())))
        optimizer.step()
    pipe.save_pretrained(out)
    held = sum(p.numel() for p in pipe.parameters())
    return losses, held


def wanted(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def close(one: list[float], other: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_is_trained_and_written_back(
    pools: Pools, tmp_path: Path, tied: bool
) -> None:
    base = folder_of(tmp_path, tied=tied)
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(base)).train()
    want = wanted(plain)
    one, held = trained(str(base), None, str(tmp_path / "one"))
    close(one, want)
    two = pools[2].run(trained, str(base), None, str(tmp_path / "two"))
    for losses, own in two:
        close(losses, want)
        assert own < held
    for name in ("one", "two"):
        again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / name)).train()
        with torch.no_grad():
            torch.testing.assert_close(again(**batch()).logits, plain(**batch()).logits)


def test_adapters_are_trained_and_written_back(pools: Pools, tmp_path: Path) -> None:
    base = folder_of(tmp_path)
    plain, folder = plain_adapters(base, tmp_path / "adapters")
    want = wanted(plain)
    one, _ = trained(str(base), str(folder), str(tmp_path / "one"))
    close(one, want)
    for losses, _ in pools[2].run(trained, str(base), str(folder), str(tmp_path / "two")):
        close(losses, want)
    for name in ("one", "two"):
        model = transformers.AutoModelForCausalLM.from_pretrained(str(base))
        again = peft.PeftModel.from_pretrained(model, str(tmp_path / name)).train()
        with torch.no_grad():
            torch.testing.assert_close(again(**batch()).logits, plain(**batch()).logits)


def test_new_adapters_begin_as_the_base_model(tmp_path: Path) -> None:
    base = folder_of(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(base)).train()
    pipe = stagewise.from_pretrained(base, batch(), adapters=lora(), num_microbatches=2)
    trains = {name.split(".lora_")[-1][0] for name, p in pipe.named_parameters() if p.requires_grad}
    assert trains == {"A", "B"}
    close([float(pipe.step(**batch()))], [float(plain(**batch()).loss.detach())])
    assert all(
        (p.abs().sum() > 0) == ("lora_A" in n) for n, p in pipe.named_parameters() if "lora_" in n
    )


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(stagewise.errors.ModelError, match=r"has no config\.json"):
        stagewise.from_pretrained(tmp_path, batch())


def test_a_misspelt_argument_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    for given, meant in (("quantization", "quantization_config"), ("los", "loss")):
        message = rf"^from_pretrained\(\) got .* '{given}'; write {meant}="
        with pytest.raises(TypeError, match=message):
            stagewise.from_pretrained(tmp_path / "not there", batch(), **{given: None})
    with pytest.raises(TypeError, match="argument 'state'"):
        stagewise.from_pretrained(tmp_path / "not there", batch(), state="folder")
