"""Quantised bases with adapters: torchao and bitsandbytes on the CPU (make test-hf)."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.batch.layouts import held_bytes
from stagewise.errors import CheckpointError, ModelError
from stagewise.pretrained import in_blocks
from stagewise.pretrained.in_blocks import _NUM_AT_ONCE, InBlocks
from stagewise.pretrained.quantised import quantiser_of
from tests.harness import Pools

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers, peft, torchao and bitsandbytes
    pytest.mark.timeout(600),
]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "use_cache": False,
}
KINDS = ("int8", "int4", "nf4", "double", "8bit")


def config_of(kind: str) -> Any:
    """What transformers is given; skips where its package is missing."""
    pytest.importorskip("torchao" if kind.startswith("int") else "bitsandbytes")
    if kind.startswith("int"):
        from torchao import quantization as ao

        four = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(32)}
        ways = {"int8": ao.Int8WeightOnlyConfig, "int4": lambda: ao.IntxWeightOnlyConfig(**four)}
        return transformers.TorchAoConfig(ways[kind]())
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=kind == "double"
    )


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    return model


def folder_of(tmp: Path) -> Path:
    small_model().save_pretrained(str(tmp / "base"), max_shard_size="60KB")  # type: ignore[operator]
    return tmp / "base"


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (8, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def plain(base: Path, kind: str, out: Path) -> nn.Module:
    """One process's model, quantised by transformers, with adapters that are saved in `out`."""
    config = config_of(kind)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(str(base), quantization_config=config, device_map="cpu")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    made = peft.get_peft_model(model, lora)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(str(out))
    return made.train()


Seen = tuple[list[float], dict[str, Tensor]]


def steps(model: Any, named: dict[str, nn.Parameter], loss_of: Any) -> Seen:
    """Losses of three steps, and the gradients of the last."""
    trained = {name: p for name, p in named.items() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.2) if trained else None
    losses, gradients = [], {}
    for _ in range(3):
        losses.append(float(loss_of()))
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return losses, gradients


def plain_steps(model: nn.Module) -> Seen:
    def loss_of() -> Tensor:
        loss: Tensor = model(**batch()).loss
        loss.backward()
        return loss.detach()

    return steps(model, dict(model.named_parameters()), loss_of)


def pipelined_steps(
    base: str, adapters: str, kind: str, num_devices: int, **plan: Any
) -> tuple[Seen, int]:
    pipe = stagewise.from_pretrained(
        base,
        batch(),
        adapters=adapters,
        quantization_config=config_of(kind),
        plan=plan or {"num_devices": num_devices},
        num_microbatches=2,
    )
    seen = steps(pipe, dict(pipe.named_parameters()), lambda: pipe.step(**batch()))
    return seen, sum(map(held_bytes, pipe.parameters()))


def cases_on_ranks(cases: list[tuple[str, str, str, int]]) -> list[tuple[Seen, int]]:
    return [pipelined_steps(*case) for case in cases]


def replicas_on_ranks(case: tuple[str, str, str, int]) -> Seen:
    return pipelined_steps(*case, num_stages=1, replicas=(2,))[0]


def assert_same(found: list[Seen], want: Seen) -> None:
    for losses, _ in found:
        assert losses == pytest.approx(want[0], rel=2e-6)
    gradients = {name: g for _, own in found for name, g in own.items()}
    assert gradients.keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def is_here(kind: str) -> bool:
    package = "torchao" if kind.startswith("int") else "bitsandbytes"
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_as_on_a_base_quantised_by_transformers(tmp_path: Path, kind: str) -> None:
    """In one process, cut into one stage or four."""
    base, full = folder_of(tmp_path), 4 * sum(p.numel() for p in small_model().parameters())
    want = plain_steps(plain(base, kind, tmp_path / kind))
    for num_devices in (1, 4):
        found, held = pipelined_steps(str(base), str(tmp_path / kind), kind, num_devices)
        assert_same([found], want)
        assert held < 0.6 * full


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_are_quantised_to_the_same_bits(kind: str) -> None:
    quantise = pytest.importorskip("bitsandbytes").functional.quantize_4bit
    shapes = (1000, 300), (7, 13), (_NUM_AT_ONCE // 64, 64)  # the first two with a rest
    for shape in shapes:
        for double in (False, True):
            weight = torch.randn(shape, dtype=torch.bfloat16)
            options = {"quant_type": kind, "compress_statistics": double}
            whole, about = quantise(weight, **options)
            with InBlocks():
                parts, about_parts = quantise(weight, **options)
            assert torch.equal(parts, whole)
            assert torch.equal(about_parts.absmax, about.absmax)


def test_a_copy_of_a_mapped_weight_is_not_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    quantise = pytest.importorskip("bitsandbytes").functional.quantize_4bit
    mapped, let_go = torch.randn(512, 384), list[Tensor]()
    monkeypatch.setattr(in_blocks, "drop_pages", let_go.append)
    with InBlocks(mapped=mapped):
        quantise(mapped.T.contiguous())  # as of GPT-2's layers
        assert not let_go
        quantise(mapped)
    assert len(let_go) == 3 and all(part.data_ptr() >= mapped.data_ptr() for part in let_go)


def test_a_weight_is_mapped_and_let_go_as_far_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, drop_pages = folder_of(tmp_path), list[Tensor]()
    monkeypatch.setattr(in_blocks, "drop_pages", drop_pages.append)
    pipe = stagewise.from_pretrained(
        base, batch(), num_microbatches=2, quantization_config=config_of("nf4")
    )
    weights = [module.weight for module in pipe.module.modules() if hasattr(module, "quant_state")]
    assert len(drop_pages) == len(weights) == 7 * SIZES["num_hidden_layers"]
    assert not any(part.is_shared() or part.requires_grad for part in drop_pages)


@pytest.mark.parametrize(("ranks", "some"), [(2, KINDS), (4, ("nf4",))])
def test_processes_train_adapters_on_their_own_quantised_part(
    pools: Pools, tmp_path: Path, ranks: int, some: tuple[str, ...]
) -> None:
    base, kinds = folder_of(tmp_path), [kind for kind in some if is_here(kind)]
    if not kinds:
        pytest.skip("neither torchao nor bitsandbytes is installed")
    want = {kind: plain_steps(plain(base, kind, tmp_path / kind)) for kind in kinds}
    cases = [(str(base), str(tmp_path / kind), kind, ranks) for kind in kinds]
    seen = pools[ranks].run(cases_on_ranks, cases, seconds=400)
    for index, kind in enumerate(kinds):
        assert_same([rank[index][0] for rank in seen], want[kind])
    if ranks == 2:
        assert_same(pools[2].run(replicas_on_ranks, cases[0], seconds=200), want[kinds[0]])


@pytest.mark.parametrize("kind", ["int8", "nf4", "8bit"])
def test_a_folder_that_is_quantised_is_read_as_it_is(tmp_path: Path, kind: str) -> None:
    config, folder = config_of(kind), str(tmp_path / "quantised")
    load = transformers.AutoModelForCausalLM.from_pretrained
    made = load(str(folder_of(tmp_path)), quantization_config=config, device_map="cpu")
    made.save_pretrained(folder)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    again = peft.get_peft_model(load(folder, device_map="cpu"), lora)
    again.save_pretrained(str(tmp_path / "adapters"))
    want = plain_steps(again.train())
    pipe = stagewise.from_pretrained(
        folder,
        batch(),
        adapters=str(tmp_path / "adapters"),
        plan={"num_devices": 2},
        num_microbatches=2,
    )
    predicted = sum(cost.parameter_bytes for cost in pipe.plan.stage_costs)
    # Before a step, in which a layer of 8 bits takes the scales over from its weight.
    assert predicted == pytest.approx(sum(map(held_bytes, pipe.parameters())), rel=0.02)
    named = dict(pipe.named_parameters())
    assert_same([steps(pipe, named, lambda: pipe.step(**batch()))], want)


def test_adapters_are_saved_and_quantised_weights_are_not(tmp_path: Path) -> None:
    config, lora = config_of("nf4"), peft.LoraConfig(r=2, target_modules=["q_proj"])
    given = {"quantization_config": config, "num_microbatches": 2}
    pipe = stagewise.from_pretrained(folder_of(tmp_path), batch(), adapters=lora, **given)
    pipe.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    with pytest.raises(
        CheckpointError, match=r"is quantised.*save_pretrained\(folder\) writes the"
    ):
        pipe.save_checkpoint(tmp_path / "whole")


def test_another_way_of_quantising_is_refused(tmp_path: Path) -> None:
    base = folder_of(tmp_path)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised by gptq, which is not read layer by layer"):
        stagewise.from_pretrained(base, batch())


def test_another_value_for_the_way_of_quantising_is_refused_or_understood(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = folder_of(tmp_path)
    for asked, why in (("nf4", "asks for 'nf4'"), ({"bits": 4}, "no `quant_method`")):
        with pytest.raises(ModelError, match=rf"{why}.*give a BitsAndBytesConfig"):
            stagewise.from_pretrained(base, batch(), quantization_config=asked)
    config = transformers.AutoConfig.from_pretrained(str(base))
    made = quantiser_of(config, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, base)
    assert made.quantization_config.bnb_4bit_quant_type == "nf4"


@pytest.mark.parametrize("kind", ["nf4", "double"])
def test_adapters_train_on_after_an_evaluation(tmp_path: Path, kind: str) -> None:
    """On some CPUs bitsandbytes packs weights anew in eval mode, and has no gradient from then on;
    and that change of its own was taken for one that makes microbatches differ.
    """
    base, seen = folder_of(tmp_path), []
    plain(base, kind, tmp_path / "adapters")
    for evaluates in (False, True):
        pipe = stagewise.from_pretrained(
            base,
            batch(),
            adapters=str(tmp_path / "adapters"),
            quantization_config=config_of(kind),
            num_microbatches=2,
        )

        def step(pipe: Any = pipe, evaluates: bool = evaluates) -> Tensor:
            loss: Tensor = pipe.step(**batch())
            if evaluates:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", stagewise.errors.ExactnessWarning)
                    pipe.predict(**batch())
            return loss

        seen.append(steps(pipe, dict(pipe.named_parameters()), step))
    assert_same(seen[1:], seen[0])
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in pipe.module.modules())
