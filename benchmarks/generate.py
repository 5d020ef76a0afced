"""Tokens per second of `pipe.generate`, beside the plain model's `generate` (needs transformers).

Both continue the same prompts, of different lengths, in the same processes in turn, so that noise
affects them alike; with several ranks, rank 0 runs the plain model while the others wait. The
models are small ones of random weights, with a thread on each rank: what stagewise adds for each
token shows more than it would with large ones.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

import stagewise
from benchmarks.workers import Row, keep_to_core, print_rows, run_workers

VOCABULARY = 256
NOTES = (
    "tokens/s: median of the rounds; ratio: ours over the plain model's, in the same run",
    "K=2 is two processes on two cores, in which a lane each takes its turn; K=1 is one process",
)


@dataclass(frozen=True)
class Size:
    """The measures of models and prompts."""

    width: int = 256
    num_layers: int = 8
    prompts: int = 16
    length: int = 32
    new_tokens: int = 32
    rounds: int = 5


QUICK = Size(width=128, num_layers=4, new_tokens=16, rounds=3)


def main(
    quick: bool = typer.Option(False, help="Smaller models, fewer tokens and rounds."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure how fast prompts are continued."""
    rows = [
        row
        for num_ranks in (1, 2)
        for row in run_workers(num_ranks, measured, QUICK if quick else Size())
    ]
    print_rows("generating", rows, as_json=json, notes=NOTES)


def measured(size: Size) -> list[Row]:
    """Run on every rank: all models, each in both ways."""
    import transformers

    transformers.logging.set_verbosity_error()
    keep_to_core()
    return [_raced(name, make, size) for name, make in MODELS.items()]


def _raced(name: str, make: Callable[[Size], Any], size: Size) -> Row:
    options = {
        **_prompts(size),
        "do_sample": False,
        "min_new_tokens": size.new_tokens,
        "max_new_tokens": size.new_tokens,
    }
    plain, pipe = make(size).eval(), _pipeline(make, size)
    ways: dict[str, Callable[[], Tensor | None]] = {
        "plain": lambda: plain.generate(**options) if dist.get_rank() == 0 else None,
        "ours": lambda: pipe.generate(**options),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Tensor | None] = {}
    for number in range(1 + size.rounds):
        for way, generate in ways.items():
            dist.barrier()
            start = time.perf_counter()
            found[way] = generate()
            dist.barrier()
            if number:  # the first warms up
                seconds[way].append(time.perf_counter() - start)
    same = found["plain"] is None or torch.equal(*found.values())  # type: ignore[arg-type]
    tokens = size.prompts * size.new_tokens
    plain_rate, rate = (tokens / statistics.median(taken) for taken in seconds.values())
    return {
        "model": name,
        "ranks": dist.get_world_size(),
        "plain, tokens/s": plain_rate,
        "ours, tokens/s": rate,
        "ratio": rate / plain_rate,
        "same tokens": str(same),
    }


def _prompts(size: Size) -> dict[str, Tensor]:
    """Prompts of half the length to all of it, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    shape = size.prompts, size.length
    ids = torch.randint(2, VOCABULARY, shape, generator=generator)
    lengths = torch.randint(size.length // 2, size.length + 1, (shape[0], 1), generator=generator)
    mask = (torch.arange(size.length) >= size.length - lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _pipeline(make: Callable[[Size], Any], size: Size) -> stagewise.Pipeline:
    """The model's cells in equal numbers on all ranks."""
    model = make(size)
    model.config.use_cache = False
    example = {name: tensor[:2] for name, tensor in _prompts(size).items()}
    batch = {**example, "labels": example["input_ids"]}
    number, ranks = len(stagewise.capture(model, **batch).chain), dist.get_world_size()
    edges = [number * rank // ranks for rank in range(ranks + 1)]
    balance = tuple(edges[rank + 1] - edges[rank] for rank in range(ranks))
    plan = stagewise.Plan(balance=balance, num_microbatches=1)
    return stagewise.Pipeline(model, plan, loss=lambda output: output.loss)


def _decoder(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _gpt2(size: Size) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=size.width,
        n_layer=size.num_layers,
        n_head=4,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _llama(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_decoder(size)))


def _t5(size: Size) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=size.width,
        d_kv=size.width // 4,
        d_ff=2 * size.width,
        num_layers=size.num_layers // 2,
        num_heads=4,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def _qwen3(size: Size) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**_decoder(size), head_dim=size.width // 4, tie_word_embeddings=True)
    return Qwen3ForCausalLM(config)


MODELS = {"GPT-2": _gpt2, "Llama": _llama, "T5": _t5, "Qwen3": _qwen3}


if __name__ == "__main__":
    typer.run(main)
