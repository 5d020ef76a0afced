"""One rank of `benchmarks.resident`, in a separate process: its memory, step by step.

Only torch is loaded before the system that is measured, so its own imports are counted.
"""

import gc
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

NUM_RANKS, NUM_BLOCKS, NUM_MICROBATCHES = 2, 8, 8
BATCH, CONTEXT, NUM_STEPS = 16, 128, 6
MEBIBYTE = 1 << 20
Step = Callable[[], object]


class Block(nn.Module):
    """A Transformer's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // 64
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        heads = self.qkv(self.norm(x)).view(samples, length, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)  # type: ignore[no-any-return]


def main(rank: int, store: str, system: str, width: int, recompute: str) -> None:
    """Print one JSON object with what this rank holds, in bytes beyond its imports."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(minutes=5),
    )
    bare = _status("VmRSS")
    _load(system)
    gc.collect()
    before = _status("VmRSS")
    torch.manual_seed(0)
    step, zero_grad = SYSTEMS[system](rank, width, recompute)
    gc.collect()
    between, peaks = [], []
    for _ in range(NUM_STEPS):
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        step()
        peaks.append(_status("VmHWM") - before)
        between.append(_status("VmRSS") - before)  # the gradients included
        zero_grad()
    dist.barrier()
    row = {"import": before - bare, "between": sorted(between)[NUM_STEPS // 2], "peak": max(peaks)}
    print(json.dumps(row))


def _load(system: str) -> None:
    if system == "stagewise":
        import stagewise

        _ = stagewise.Pipeline, stagewise.Plan
    else:
        import torch.distributed.pipelining
        import torch.utils.checkpoint  # noqa: F401


def _task(width: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(*(Block(width) for _ in range(NUM_BLOCKS)))
    return model, torch.randn(BATCH, CONTEXT, width), torch.randn(BATCH, CONTEXT, width)


def _stagewise(rank: int, width: int, recompute: str) -> tuple[Step, Step]:
    import stagewise
    from stagewise import free_pages

    model, x, y = _task(width)
    half = NUM_BLOCKS // NUM_RANKS
    by_block: dict[str, Any] = {"segments": (((1, True),) * half,) * NUM_RANKS}
    how = {
        "never": {},
        "by stage": {"recompute": "always"},
        "by block": by_block,
        "by block, pages kept": by_block,
        "planned": {"recompute": "always"},
    }[recompute]
    cut: dict[str, Any] = {"balance": (half,) * NUM_RANKS, "num_microbatches": NUM_MICROBATCHES}
    loss = nn.functional.mse_loss
    if recompute == "planned":
        plan = stagewise.plan(model, x, target=y, loss=loss, num_stages=NUM_RANKS, **cut, **how)
    else:
        plan = stagewise.Plan(schedule="1f1b", **cut, **how)
    pipe = stagewise.Pipeline(model, plan, loss=loss)
    if recompute.endswith("pages kept"):
        free_pages.HEAP.trim = None
    return lambda: pipe.step(x, target=y), pipe.zero_grad


def _torch(rank: int, width: int, recompute: str) -> tuple[Step, Step]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> object:
            return checkpoint(self.inner, x, use_reentrant=False)

    model, x, y = _task(width)
    half = NUM_BLOCKS // NUM_RANKS
    own = nn.Sequential(*list(model)[half * rank : half * (rank + 1)])
    if recompute == "by block":
        own = nn.Sequential(*map(Checkpointed, own))
    stage = PipelineStage(own, rank, NUM_RANKS, torch.device("cpu"))
    schedule = Schedule1F1B(stage, NUM_MICROBATCHES, loss_fn=nn.functional.mse_loss)

    def step() -> None:
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])

    return step, own.zero_grad


SYSTEMS = {"stagewise": _stagewise, "torch.distributed.pipelining": _torch}


def _status(field: str) -> int:
    """Bytes, from Linux's own account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


if __name__ == "__main__":
    own_rank, own_store, own_system, own_width, own_recompute = sys.argv[1:]
    main(int(own_rank), own_store, own_system, int(own_width), own_recompute)
