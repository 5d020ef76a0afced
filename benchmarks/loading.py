"""The memory of a process while it loads its part of a pretrained model (needs transformers).

Two ranks call `from_pretrained` on a folder of several files, after a tiny one that imports what is
needed. Counted, once every parameter has been read, is the peak of the resident set beyond that
before the call, over the bytes of this rank's parameters and buffers. Beside it transformers' own
`from_pretrained`, which holds the whole model in every process; and, with bitsandbytes installed, a
base in bfloat16, as they come, that is quantised to NF4 while it is read. Its layers are as wide as
those of a model of 7 billion parameters: what the graph of a layer takes in Python, 1.5 MiB, does
not depend on that, so it weighs more in narrower ones (`--quick`).
"""

import gc
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer

import stagewise
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.batch.layouts import held_bytes
from stagewise.free_pages import FreePages, trim_of_glibc

MEBIBYTE = 1 << 20
GOAL = "goal: at most 1.15 times a process's own part (issue 18)"


def main(
    quick: bool = typer.Option(False, help="A smaller model."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure what a process holds at most while it loads."""
    with tempfile.TemporaryDirectory() as folder:
        large, tiny, base = (Path(folder) / name for name in ("large", "tiny", "base"))
        _write(large, width=512 if quick else 1024, num_layers=8)
        _write(tiny, width=16, num_layers=2)
        if find_spec("bitsandbytes") is not None:
            _write(base, width=1024 if quick else 4096, num_layers=4, dtype=torch.bfloat16)
        rows = run_workers(2, _measured, str(large), str(tiny), str(base))
    print_rows("memory while loading", rows, as_json=json, notes=(GOAL,))


def _write(
    folder: Path, *, width: int, num_layers: int, dtype: torch.dtype = torch.float32
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.save_pretrained(str(folder), max_shard_size="20MB")


def _measured(large: str, tiny: str, base: str) -> list[Row]:
    """The rows of all ranks, on every rank."""
    from transformers import AutoModelForCausalLM

    ids = torch.ones(4, 16, dtype=torch.long)
    ways: dict[str, Any] = {
        "stagewise.from_pretrained": lambda folder: stagewise.from_pretrained(
            folder, {"input_ids": ids, "labels": ids}, num_microbatches=2
        ),
        "transformers' from_pretrained": AutoModelForCausalLM.from_pretrained,  # maps the files
    }
    if find_spec("bitsandbytes") is not None:
        from transformers import BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        ways["stagewise, quantised to NF4"] = lambda folder: stagewise.from_pretrained(
            folder,
            {"input_ids": ids, "labels": ids},
            num_microbatches=2,
            quantization_config=nf4,
        )
    own: list[Row] = []
    for name, load in ways.items():
        load(tiny)
        before = _settled()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        model = load(base if "NF4" in name else large)
        for parameter in model.parameters():
            parameter.flatten()[::512].sum()  # what is only mapped counts when it is read
        peak = _resident("VmHWM") - before
        module = getattr(model, "module", model)
        part = sum(held_bytes(t) for t in {*module.parameters(), *module.buffers()})
        own.append(
            {
                "what": name,
                "rank": dist.get_rank(),
                "own MiB": part / MEBIBYTE,
                "peak MiB": peak / MEBIBYTE,
                "ratio": peak / part,
            }
        )
        del model, module
    every: list[list[Row]] = [own] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return [row for pair in zip(*every, strict=True) for row in pair]


def _settled() -> int:
    gc.collect()
    FreePages(trim_of_glibc()).give_back()
    return _resident("VmRSS")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    typer.run(main)
