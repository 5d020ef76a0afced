"""Greedy output of ranks that hold some blocks each is the plain model's, token for token."""

from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers

import stagewise
from stagewise.errors import ModelError, UsageError
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


def model_of(kind: str) -> tuple[Any, list[str] | None]:
    torch.manual_seed(0)
    if kind == "GPT-2":
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=4, n_head=4, eos_token_id=1, pad_token_id=0
        )
        return transformers.GPT2LMHeadModel(config), OF_GPT2
    if kind == "Llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)), PATHS
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=3,
            num_heads=4,
            eos_token_id=1,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
        return transformers.T5ForConditionalGeneration(config), None
    config = transformers.Qwen3Config(**SIZE, head_dim=8, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config), PATHS


def prompts() -> dict[str, torch.Tensor]:
    """Fifty, of 1 to 12 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (50, 12), generator=generator)
    lengths = torch.randint(1, 13, (50, 1), generator=generator)
    mask = (torch.arange(12) >= 12 - lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def pipe_of(kind: str, num_ranks: int) -> stagewise.Pipeline:
    model, cells = model_of(kind)
    model.double().eval()
    model.config.use_cache = False
    batch = {**prompts(), "labels": prompts()["input_ids"]}
    example = {name: tensor[:2] for name, tensor in batch.items()}
    if cells is None:  # cut where the planner would, in the midst of blocks too
        size = len(stagewise.capture(model, **example).chain)
        edges = [size * number // num_ranks for number in range(num_ranks + 1)]
        balance = tuple(after - before for before, after in pairwise(edges))
    else:
        stagewise.capture_cells(model, cells, **example)
        balance = {1: (7,), 2: (3, 4), 4: (2, 1, 1, 3)}[num_ranks]
    plan = stagewise.Plan(balance=balance, num_microbatches=1)
    return stagewise.Pipeline(model, plan, loss=lambda output: output.loss)


def generated(kind: str, num_ranks: int) -> list[bool]:
    """Whether a rank's tokens are the plain model's, in the WAYS."""
    plain, _ = model_of(kind)
    plain.double().eval()
    pipe = pipe_of(kind, num_ranks)  # which needs the model's object no more
    same = []
    for way in WAYS:
        torch.manual_seed(3)
        options = {name: value for name, value in way.items() if name != "lanes"}
        expected = plain.generate(**prompts(), **options, max_new_tokens=8)
        torch.manual_seed(3 + pipe.rank)
        found = pipe.generate(**prompts(), **way, max_new_tokens=8)
        same.append(torch.equal(found, expected))
    return same


WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "lanes": 1, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"do_sample": False, "lanes": 7, "min_new_tokens": 2},
    {"do_sample": True, "top_k": 5, "temperature": 0.7},
    {"do_sample": False, "num_beams": 3},
]


def all_generated(kinds: list[str], num_ranks: int) -> dict[str, list[bool]]:
    found = {kind: generated(kind, num_ranks) for kind in kinds}
    if num_ranks > 1:
        pipe = pipe_of("GPT-2", num_ranks)
        with pytest.raises(UsageError, match=r"generate.output_attentions=True. needs the whole"):
            pipe.generate(**prompts(), output_attentions=True)
        pipe.load_state_dict({n: t * torch.nan for n, t in pipe.state_dict().items()})
        with pytest.raises(ModelError, match="generate met NaN"):  # on every rank
            pipe.generate(**prompts(), max_new_tokens=2, do_sample=False)
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tokens_are_the_plain_models(num_ranks: int) -> None:
    kinds = ["GPT-2", "Llama", "Qwen3", "T5"]
    same = {kind: [True] * len(WAYS) for kind in kinds}
    if num_ranks == 1:
        assert all_generated(kinds, 1) == same
        return
    pools = Pools()
    try:
        for found in pools[num_ranks].run(all_generated, kinds, num_ranks, seconds=200):
            assert found == same
    finally:
        pools.kill()
