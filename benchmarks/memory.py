"""How much host memory does a worker need to build its share of a model?

Four worker processes build a Transformer of about 400 million parameters in bfloat16, each row in
new processes: the whole model as usual, on the meta device with new values, and on the meta device
with values from a checkpoint written by four ranks. A worker's growth is its peak resident memory
(VmHWM of /proc/self/status) minus what it had before the model.
"""

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

import stagewise
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.models import decoder_lm

NUM_WORKERS = 4
NUM_LAYERS, WIDTH, VOCABULARY = 32, 1024, 8192  # 12.6 M parameters a layer: 419.7 M
QUICK_LAYERS, QUICK_WIDTH = 16, 512  # 58.8 M
MEBIBYTE = 1 << 20
BALANCE = {
    NUM_LAYERS: (9, 8, 8, 9),
    QUICK_LAYERS: (5, 4, 4, 5),
}


def main(
    quick: bool = typer.Option(False, help="A model of a seventh of the size."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure what a worker's memory grows by while it builds its stages."""
    size = (QUICK_LAYERS, QUICK_WIDTH) if quick else (NUM_LAYERS, WIDTH)
    with tempfile.TemporaryDirectory() as directory:
        rows = [
            run_workers(NUM_WORKERS, measure, what, build, size, Path(directory))
            for what, build in BUILDS.items()
        ]
    print_rows(
        f"host memory of one of {NUM_WORKERS} workers",
        rows,
        as_json=json,
        notes=("growth: the largest over the workers; a quarter of the model would be 0.25",),
    )


def _whole(model: Callable[[], nn.Sequential], plan: stagewise.Plan, directory: Path) -> None:
    stagewise.Pipeline(model(), plan, loss=_loss)


def _on_meta(model: Callable[[], nn.Sequential], plan: stagewise.Plan, directory: Path) -> None:
    with torch.device("meta"):
        built = model()
    pipe = stagewise.Pipeline(built, plan, loss=_loss)
    pipe.save_checkpoint(directory)


def _loaded(model: Callable[[], nn.Sequential], plan: stagewise.Plan, directory: Path) -> None:
    with torch.device("meta"):
        built = model()
    stagewise.Pipeline(built, plan, loss=_loss, state=directory)


Build = Callable[[Callable[[], nn.Sequential], stagewise.Plan, Path], None]
BUILDS: dict[str, Build] = {
    "whole model, then its stages": _whole,
    "meta device, initialised and saved": _on_meta,
    "meta device, loaded": _loaded,
}


def measure(what: str, build: Build, size: tuple[int, int], directory: Path) -> Row:
    """Run on every rank."""
    num_layers, width = size

    def model() -> nn.Sequential:
        return decoder_lm(
            vocabulary=VOCABULARY, num_layers=num_layers, width=width, num_heads=width // 64
        )

    with torch.device("meta"):
        whole_bytes = sum(p.nbytes for p in model().bfloat16().parameters())
    plan = stagewise.Plan(balance=BALANCE[num_layers], schedule="1f1b", num_microbatches=4)
    torch.set_default_dtype(torch.bfloat16)
    _warm_up()
    before = _status("VmRSS")
    build(model, plan, directory)
    growth = torch.tensor([_status("VmHWM") - before], dtype=torch.int64)
    dist.all_reduce(growth, dist.ReduceOp.MAX)
    return {
        "how": what,
        "model_mebibytes": whole_bytes / MEBIBYTE,
        "share_mebibytes": whole_bytes / NUM_WORKERS / MEBIBYTE,
        "growth_mebibytes": int(growth) / MEBIBYTE,
        "growth_over_model": int(growth) / whole_bytes,
    }


def _warm_up() -> None:
    """Load what a first pipeline loads, so that it is not counted."""
    plan = stagewise.Plan(balance=(1,) * NUM_WORKERS, schedule="1f1b", num_microbatches=4)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(NUM_WORKERS)))
    stagewise.Pipeline(model, plan, loss=_loss)
    gc.collect()


def _status(field: str) -> int:
    """Bytes, from Linux's own account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


if __name__ == "__main__":
    typer.run(main)
