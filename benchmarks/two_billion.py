"""A Transformer of two billion parameters on this machine: planned whole, run one stage at a time.

Transformer-L with 38 layers (2.04 billion parameters, 8 GB in float32) is built on the meta device
and cut into 16 stages by estimated costs; one stage is then materialised, with the values that it
has in the whole model, and runs forward and backward alone. Each row is a separate process, whose
peak memory includes PyTorch.
"""

import itertools
import resource
import time
from collections.abc import Callable

import torch
import typer
from torch import Tensor, nn

import stagewise
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.models import transformer_l
from stagewise.planning import plan_from_costs

NUM_LAYERS, WIDTH = 38, 2048
NUM_STAGES, NUM_MICROBATCHES = 16, 32
SAMPLES, CONTEXT = 1, 256  # of one microbatch
STAGE = NUM_STAGES // 2
LIMIT_SECONDS, LIMIT_GIBIBYTES = 60.0, 2.0  # for the plan


def main(json: bool = typer.Option(False, "--json", help="One JSON object per row.")) -> None:
    """Plan a model of two billion parameters and run one of its stages."""
    rows = [run_workers(1, measure, what, run) for what, run in RUNS.items()]
    print_rows(
        f"Transformer-L, {NUM_LAYERS} layers, {NUM_STAGES} stages",
        rows,
        as_json=json,
        notes=(f"planning must take less than {LIMIT_SECONDS:.0f} s, {LIMIT_GIBIBYTES:.0f} GiB",),
    )
    if rows[0]["seconds"] > LIMIT_SECONDS or rows[0]["peak_gibibytes"] > LIMIT_GIBIBYTES:  # type: ignore[operator]
        raise SystemExit(1)


def measure(what: str, run: Callable[[], int]) -> Row:
    """Run in a separate process."""
    start = time.perf_counter()
    num_parameters = run()
    seconds = time.perf_counter() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "what": what,
        "million_parameters": num_parameters / 1e6,
        "seconds": seconds,
        "peak_gibibytes": peak_bytes / (1 << 30),
    }


def _planned() -> int:
    model = _model()
    _plan(model)
    return _size(model)


def _one_stage() -> int:
    model = _model()
    plan = _plan(model)
    ends = list(itertools.accumulate(plan.balance))
    part = model[ends[STAGE - 1] : ends[STAGE]]
    alone = stagewise.Plan(balance=(len(part),), schedule="1f1b", num_microbatches=1)
    pipe = stagewise.Pipeline(part, alone, loss=nn.functional.mse_loss)
    hidden = torch.randn(SAMPLES, CONTEXT, WIDTH)
    loss = pipe.step(hidden, target=torch.zeros_like(hidden))
    gradients = [parameter.grad for parameter in pipe.parameters()]
    assert loss.isfinite() and all(g is not None and g.any() for g in gradients)
    return _size(part)


RUNS: dict[str, Callable[[], int]] = {
    "build and plan the whole": _planned,
    "the same, then one stage made real, forward and backward": _one_stage,
}


def _model() -> nn.Sequential:
    with torch.device("meta"):
        return transformer_l(NUM_LAYERS)


def _plan(model: nn.Sequential) -> stagewise.Plan:
    tokens = torch.empty(SAMPLES * NUM_MICROBATCHES, CONTEXT, dtype=torch.long, device="meta")
    cells = stagewise.estimate(
        model,
        tokens,
        target=tokens,
        loss=_loss,
        num_microbatches=NUM_MICROBATCHES,
        device="cpu",
    )
    return plan_from_costs(cells, num_stages=NUM_STAGES, num_microbatches=NUM_MICROBATCHES)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    typer.run(main)
