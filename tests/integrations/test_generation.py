"""Greedy output of ranks that hold some blocks each is the plain model's, token for token."""

import re
import time
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import torch.distributed as dist
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


WRONG: dict[str, tuple[object, dict[str, Any], str]] = {
    "floats": (torch.zeros(2, 3), {}, "torch.float32; give a tensor of integers with the shape"),
    "a list": ([[1, 2]], {}, "input_ids is .*; give a tensor of integers"),
    "no prompt": (torch.zeros(0, 3).long(), {}, "neither of them 0"),
    "no token": (torch.zeros(2, 0).long(), {}, "neither of them 0"),
    "another vocabulary": (
        torch.full((2, 3), 64),
        {},
        "64, but the model's tokens go from 0 to 63",
    ),
    "too long": (
        torch.ones(2, 24).long(),
        {"max_new_tokens": 1024},
        "1048 long, but the model has 1024 positions; make max_new_tokens at most 1000",
    ),
}


def refused() -> tuple[list[str], bool]:
    """Which wrong prompts were not refused in the words above, and whether the next are well."""
    pipe = pipe_of("GPT-2", 2)
    unlike = []
    for name, (ids, options, words) in WRONG.items():
        with pytest.raises(UsageError) as raised:
            pipe.generate(ids, **{"max_new_tokens": 2, **options})  # type: ignore[arg-type]
        if not re.search(words, str(raised.value)):
            unlike.append(f"{name}: {raised.value}")
    options = {"max_new_tokens": 2, "do_sample": False}
    plain = model_of("GPT-2")[0].double().eval()
    same = pipe.generate(**prompts(), **options)
    return unlike, torch.equal(same, plain.generate(**prompts(), **options))


def failing_alone(rank: int) -> tuple[list[str], float]:
    """What generate says where one rank fails in it, and the next call; seconds of the first."""
    pipe, said, seconds = pipe_of("GPT-2", 2), list[str](), list[float]()
    start = time.monotonic()
    fails = [StopsAt(rank)]
    for criteria in (fails, None):
        try:
            pipe.generate(**prompts(), max_new_tokens=6, stopping_criteria=criteria)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        seconds.append(time.monotonic() - start)
    return said, seconds[0]


class StopsAt(transformers.StoppingCriteria):  # type: ignore[misc]
    """Raises on one rank, at the third token; what the model's layers may raise, too."""

    def __init__(self, rank: int) -> None:
        self._rank, self._left = rank, 3

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._left -= 1
        if dist.get_rank() == self._rank and not self._left:
            raise (ValueError, ModelError)[self._rank]("raised by one")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_wrong_prompts_are_refused_on_every_rank() -> None:
    pools = Pools()
    try:
        assert pools[2].run(refused, seconds=100) == [([], True)] * 2
    finally:
        pools.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_ends_the_call_on_all(rank: int) -> None:
    pools = Pools()
    try:
        ends = pools[2].run(failing_alone, rank, seconds=60)
    finally:
        pools.kill()
    own, other = ends[rank], ends[1 - rank]
    assert own[0][0] == f"{('ValueError', 'ModelError')[rank]}: raised by one"
    assert other[0][0].startswith("PeerError") and "raised by one" in other[0][0]
    assert all(said[1].startswith("PeerError") for said, _ in ends), "nothing can be sent any more"
    assert max(seconds for _, seconds in ends) < 15


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
