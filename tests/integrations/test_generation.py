"""Greedy output of ranks that hold some blocks each is the plain model's, token for token."""

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers

import stagewise
from stagewise.integrations.generation import generate_on_ranks
from stagewise.integrations.own_part import keep_own_part
from tests.harness import Pools

SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PATHS = ["model.embed_tokens", "model.layers.*", "model.norm", "lm_head"]
OF_GPT2 = ["transformer.wte", "transformer.h.*", "transformer.ln_f", "lm_head"]


def model_of(kind: str) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    if kind == "GPT-2":
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=4, n_head=4, eos_token_id=1, pad_token_id=0
        )
        return transformers.GPT2LMHeadModel(config), OF_GPT2
    if kind == "Llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)), PATHS
    config = transformers.Qwen3Config(**SIZE, head_dim=8, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config), PATHS


def prompts() -> dict[str, torch.Tensor]:
    """Fifty, of 1 to 12 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (50, 12), generator=generator)
    lengths = torch.randint(1, 13, (50, 1), generator=generator)
    mask = (torch.arange(12) >= 12 - lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(kind: str, num_ranks: int) -> list[bool]:
    """Whether a rank's tokens are the plain model's: greedy, and sampled."""
    model, cells = model_of(kind)
    model.double().eval()
    ways: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "top_k": 5}]
    expected = []
    for way in ways:
        torch.manual_seed(3)
        expected.append(model.generate(**prompts(), **way, max_new_tokens=8))
    model.config.use_cache = False
    batch = {**prompts(), "labels": prompts()["input_ids"]}
    stagewise.capture_cells(model, cells, **{n: x[:2] for n, x in batch.items()})
    balance = {1: (7,), 2: (3, 4), 4: (2, 1, 1, 3)}[num_ranks]
    plan = stagewise.Plan(balance=balance, num_microbatches=1)
    pipe = stagewise.Pipeline(model, plan, loss=lambda output: output.loss)
    keep_own_part(model, pipe, None)
    assert num_ranks == 1 or any(p.is_meta for p in model.parameters())
    same = []
    for way, tokens in zip(ways, expected, strict=True):
        torch.manual_seed(3 + pipe.rank)
        found = generate_on_ranks(model, pipe, **prompts(), **way, max_new_tokens=8)
        same.append(torch.equal(found, tokens))
    return same


def all_generated(kinds: list[str], num_ranks: int) -> dict[str, list[bool]]:
    return {kind: generated(kind, num_ranks) for kind in kinds}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tokens_are_the_plain_models(num_ranks: int) -> None:
    kinds = ["GPT-2", "Llama", "Qwen3"]
    same = {kind: [True, True] for kind in kinds}
    if num_ranks == 1:
        assert all_generated(kinds, 1) == same
        return
    pools = Pools()
    try:
        for found in pools[num_ranks].run(all_generated, kinds, num_ranks, seconds=200):
            assert found == same
    finally:
        pools.kill()
