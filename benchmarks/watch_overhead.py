"""What do the watchdog, the digest of batches and the search for NaN cost? Ratios in one run.

Two workers train the same stages; the variants take turns, block by block of about two seconds (the
watchdog looks once a second), in a drifting order, so that whatever else the machine does falls on
all alike. Small cells (a step of a few milliseconds) show the worst case, large ones a usual step.
Steps that examine cells (the first eight, every 16th) are left out. `ratio` is the median over
rounds of a variant's mean step over the plain one's.
"""

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import typer
from torch import nn

import stagewise
from benchmarks.workers import Row, keep_to_core, print_rows, run_workers
from stagewise.engine.transport import connect
from stagewise.engine.transport.processes import timeout_of
from stagewise.engine.watch.watchdog import Watchdog

NUM_STAGES, NUM_CELLS, NUM_MICROBATCHES = 2, 8, 4
EXAMINED, EVERY = 8, 16  # calls that are looked at closely
GOAL = "goal: watchdog and digest below 1.02"


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    name: str
    width: int
    samples: int


SIZES = [Size("small cells", 64, 16), Size("large cells", 1024, 256)]
BLOCK_SECONDS, ROUNDS, QUICK_ROUNDS = 2.0, 12, 2


def main(
    quick: bool = typer.Option(False, help="Fewer steps; takes less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure a step with and without each of them."""
    rows = [row for size in SIZES for row in run_workers(NUM_STAGES, measure, size, quick)]
    print_rows("what watching costs", rows, as_json=json, notes=(GOAL,))


def measure(size: Size, quick: bool) -> list[Row]:
    """Run on every rank: the mean step of every block, compared with the plain block's."""
    keep_to_core()
    torch.manual_seed(0)  # the same batch on both ranks
    usual, finding = (_Steps(size, find_nonfinite=find) for find in (False, True))
    variants: dict[str, tuple[_Steps, AbstractContextManager[None]]] = {
        "plain": (usual, nullcontext()),
        "watchdog": (usual, _Watched()),
        "digest in every step": (usual, _Compared(usual.pipe)),
        "find_nonfinite": (finding, nullcontext()),
    }
    for connected in connect._CONNECTED.values():
        connected.watchdog.stop()
    usual.mean_seconds(2 * EXAMINED), finding.mean_seconds(2 * EXAMINED)  # a warm-up
    num_steps = max(1, round(BLOCK_SECONDS / usual.mean_seconds(EXAMINED)))
    told = [num_steps]
    dist.broadcast_object_list(told)
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    names, plain = list(variants), [0.0]
    for number in range(QUICK_ROUNDS if quick else ROUNDS):
        shift, means = number % len(names), dict[str, float]()
        for name in names[shift:] + names[:shift]:
            steps, context = variants[name]
            with context:
                means[name] = steps.mean_seconds(told[0])
        plain.append(means["plain"])
        for name, mean in means.items():
            ratios[name].append(mean / means["plain"])
    step_ms = 1e3 * statistics.median(plain[1:])
    return [
        {"model": size.name, "variant": name, "ratio": statistics.median(own), "step_ms": step_ms}
        for name, own in ratios.items()
        if name != "plain"
    ]


class _Steps:
    """A pipeline that takes steps."""

    def __init__(self, size: Size, *, find_nonfinite: bool) -> None:
        self.pipe = _pipeline(size, find_nonfinite=find_nonfinite)
        self._x = torch.randn(size.samples, size.width)
        self._count = 0

    def mean_seconds(self, num_steps: int) -> float:
        """The mean of steps that are not examined."""
        dist.barrier()
        total, counted = 0.0, 0
        while counted < num_steps:
            start = time.perf_counter()
            self.pipe.step(self._x, target=self._x)
            if self._count >= EXAMINED and self._count % EVERY:
                total, counted = total + time.perf_counter() - start, counted + 1
            self._count += 1
        return total / counted


def _pipeline(size: Size, *, find_nonfinite: bool) -> stagewise.Pipeline:
    cells = [nn.Linear(size.width, size.width) for _ in range(NUM_CELLS)]
    half = NUM_CELLS // NUM_STAGES
    plan = stagewise.Plan(
        balance=(half,) * NUM_STAGES, num_microbatches=NUM_MICROBATCHES, schedule="1f1b"
    )
    return stagewise.Pipeline(
        cells, plan, loss=nn.functional.mse_loss, find_nonfinite=find_nonfinite
    )


class _Watched(AbstractContextManager[None]):
    """With a watchdog inside."""

    def __enter__(self) -> None:
        [connected] = connect._CONNECTED.values()
        store = dist.distributed_c10d._get_default_store()
        timeout = timeout_of(connected.host)
        self._watchdog = Watchdog(dist.get_rank(), dist.get_world_size(), store, timeout)

    def __exit__(self, *_: object) -> None:
        self._watchdog.stop()


class _Compared(AbstractContextManager[None]):
    """With batches compared in every step inside."""

    def __init__(self, pipe: stagewise.Pipeline) -> None:
        self._runner = pipe._runner

    def __enter__(self) -> None:
        self._runner._compares_always = True

    def __exit__(self, *_: object) -> None:
        self._runner._compares_always = False


if __name__ == "__main__":
    typer.run(main)
