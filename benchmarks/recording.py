"""What does recording cost a step? The ratio with a recorder on and off, in one run.

Two workers train the same stages; blocks with and without a recorder take turns, in a drifting
order, so that whatever else the machine does falls on both alike. Entering and leaving, where ranks
compare clocks and gather, are left out: a step inside is compared with one outside. `ratio` is the
median over rounds of the mean step with a recorder over the one without, right within about
`error`; `cpu_ratio` compares rank 0's CPU seconds instead, which other programs on the machine
disturb less, and `added_us` is their difference for each of its instructions. Blocks are short,
since the machine's pace changes within seconds by more than a recorder costs.
"""

import statistics
import time
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import typer
from torch import nn

import stagewise
from benchmarks.workers import Row, keep_to_core, print_rows, run_workers

NUM_STAGES, NUM_CELLS, NUM_MICROBATCHES = 2, 8, 8
EXAMINED, EVERY = 8, 16  # calls that are looked at closely
SIZES = {"small cells": (64, 32), "usual cells": (512, 256), "large cells": (1024, 512)}
BLOCK_SECONDS, ROUNDS, QUICK_ROUNDS = 0.1, 240, 40
GOAL = "goal: below 1.01 for usual and large cells"


def main(
    quick: bool = typer.Option(False, help="Fewer rounds; takes less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure a step with and without a recorder."""
    rows = [run_workers(NUM_STAGES, measure, name, quick) for name in SIZES]
    print_rows("what recording costs", rows, as_json=json, notes=(GOAL,))


def measure(name: str, quick: bool) -> Row:
    """Run on every rank: the mean step of every block with a recorder, over that without."""
    keep_to_core()
    torch.manual_seed(0)  # the same batch on both ranks
    width, samples = SIZES[name]
    steps = _Steps(width, samples)
    steps.mean_seconds(2 * EXAMINED)  # a warm-up
    told = [max(1, min(80, round(BLOCK_SECONDS / steps.mean_seconds(EXAMINED)[0])))]
    dist.broadcast_object_list(told)
    walls, cpus, added, plain = list[float](), list[float](), list[float](), list[float]()
    for number in range(QUICK_ROUNDS if quick else ROUNDS):
        wall, cpu = dict[bool, float](), dict[bool, float]()
        for records in (False, True) if number % 2 else (True, False):
            context: AbstractContextManager[object] = nullcontext()
            if records:
                context = steps.pipe.record()
            with context:
                wall[records], cpu[records] = steps.mean_seconds(told[0])
        walls.append(wall[True] / wall[False])
        cpus.append(cpu[True] / cpu[False])
        added.append(cpu[True] - cpu[False])
        plain.append(wall[False])
    return {
        "model": name,
        "ratio": statistics.median(walls),
        "error": 1.25 * statistics.stdev(walls) / len(walls) ** 0.5,
        "cpu_ratio": statistics.median(cpus),
        "added_us": 1e6 * statistics.median(added) / (2 * NUM_MICROBATCHES),
        "step_ms": 1e3 * statistics.median(plain),
        "microbatches": NUM_MICROBATCHES,
    }


class _Steps:
    """A pipeline that takes steps."""

    def __init__(self, width: int, samples: int) -> None:
        cells = [nn.Linear(width, width) for _ in range(NUM_CELLS)]
        plan = stagewise.Plan(
            balance=(NUM_CELLS // NUM_STAGES,) * NUM_STAGES,
            num_microbatches=NUM_MICROBATCHES,
            schedule="1f1b",
        )
        self.pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss)
        self._optimizer = torch.optim.SGD(self.pipe.parameters(), lr=0.0)
        self._x, self._count = torch.randn(samples, width), 0

    def mean_seconds(self, num_steps: int) -> tuple[float, float]:
        """The mean of steps that are not examined, by the wall's clock and in CPU seconds."""
        dist.barrier()
        wall, cpu, counted, first = 0.0, 0.0, 0, self._count  # which finds cold caches
        while counted < num_steps:
            start, spent = time.perf_counter(), time.process_time()
            self.pipe.step(self._x, target=self._x)
            self._optimizer.step()
            if self._count >= EXAMINED and self._count % EVERY and self._count != first:
                wall, cpu = wall + time.perf_counter() - start, cpu + time.process_time() - spent
                counted += 1
            self._count += 1
        return wall / counted, cpu / counted


if __name__ == "__main__":
    typer.run(main)
