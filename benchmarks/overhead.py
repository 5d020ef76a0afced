"""How much slower than its simulation is a step? Devices are emulated by sleeping cells.

Eight worker processes represent eight devices; 24 cells, equal or unequal; 32 microbatches. The
simulator gets the sleeping times and free links, so the ratio is the engine's whole overhead:
Python, autograd, messages, and eight processes sharing this machine's cores, each pinned to one.
Not counted are the first steps, in which the engine examines cells by running them again.
`cpu_seconds` is the CPU time of all processes: emulated cells sleep, so it is the engine's work.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import typer

import stagewise
from benchmarks.workers import Row, keep_to_core, print_rows, run_workers
from stagewise.costs import CellCost
from stagewise.planning import plan_from_costs
from stagewise.testing import EmulatedDevice, emulated_model

NUM_STAGES, NUM_MICROBATCHES, NUM_CELLS = 8, 32, 24
WARM_UP = 9  # steps
DEVICE = EmulatedDevice()
WORK_SECONDS = 6.56  # forward and backward of all microbatches on one device: a step of about 1 s
BACKWARD_OVER_FORWARD = 2
WEIGHTS = {
    "equal": [1.0] * NUM_CELLS,
    "unequal": [50.0, 200.0, 80.0, 300.0, 60.0, 150.0, 90.0, 250.0] * 3,
}
PUBLISHED = (
    "GPipe's paper at K=8, M=32 (with recomputation): speedup 6.3 (Transformer), "
    "3.48 (AmoebaNet-D)",
    "torch.distributed.pipelining, measured the same way on such a machine: ratio 1.14 (gpipe), "
    "1.15 (1f1b), 1.30 (with checkpointing)",
)


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    profile: str
    schedule: str
    recompute: str


CASES = [
    Case(profile, schedule, recompute)
    for profile in WEIGHTS
    for schedule in ("gpipe", "1f1b")
    for recompute in ("never", "always")
]


def main(
    quick: bool = typer.Option(False, help="Fewer repetitions; takes less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure a step on emulated devices against the simulator."""
    rows = run_workers(NUM_STAGES, measure, CASES, 2 if quick else 7)
    print_rows("engine overhead on emulated devices", rows, as_json=json, notes=PUBLISHED)


def measure(cases: Sequence[Case], num_steps: int) -> list[Row]:
    """Run on every rank: all cases, and one device for the speedup."""
    keep_to_core()
    alone_seconds = _one_device_seconds()
    return [_measure_case(case, num_steps, alone_seconds) for case in cases]


def _measure_case(case: Case, num_steps: int, alone_seconds: float) -> Row:
    cells = _cell_costs(case.profile)
    plan = plan_from_costs(
        cells,
        num_stages=NUM_STAGES,
        num_microbatches=NUM_MICROBATCHES,
        schedule=case.schedule,
        recompute=case.recompute,
    )
    pipe = stagewise.Pipeline(_model(cells), plan, loss=_loss)
    batch = torch.zeros(NUM_MICROBATCHES, 1024)
    times, cpu = [], []
    for number in range(WARM_UP + num_steps):
        DEVICE.speed = math.inf if number < WARM_UP - 1 else 1.0
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        pipe.step(batch, target=batch)
        end, busy = time.perf_counter(), time.process_time() - busy
        times.append(_together(start, end))
        cpu.append(_in_all(busy))
    simulated, measured = plan.timeline.duration_seconds, statistics.median(times[WARM_UP:])
    return {
        "profile": case.profile,
        "schedule": case.schedule,
        "recompute": case.recompute,
        "num_stages": NUM_STAGES,
        "num_microbatches": NUM_MICROBATCHES,
        "simulated_seconds": simulated,
        "measured_seconds": measured,
        "ratio": measured / simulated,
        "cpu_seconds": statistics.median(cpu[WARM_UP:]),
        "speedup": alone_seconds / measured,
    }


def _together(start: float, end: float) -> float:
    """From when the last rank began to when the last one ended, on the clock they share."""
    stamps = torch.tensor([start, end], dtype=torch.float64)
    dist.all_reduce(stamps, dist.ReduceOp.MAX)
    return float(stamps[1] - stamps[0])


def _in_all(seconds: float) -> float:
    """The sum over all ranks."""
    total = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def _one_device_seconds() -> float:
    """A microbatch through the whole chain on one device, on rank 0, times their number.

    Without recomputation; both profiles have the same sum.
    """
    seconds = 0.0
    if dist.get_rank() == 0:
        cells = _cell_costs("equal")
        plan = plan_from_costs(cells, num_stages=1, num_microbatches=1)
        pipe = stagewise.Pipeline(_model(cells), plan, loss=_loss, transport="local")
        batch = torch.zeros(1, 1024)
        start = time.perf_counter()
        pipe.step(batch, target=batch)
        seconds = NUM_MICROBATCHES * (time.perf_counter() - start)
    dist.barrier()
    return seconds


def _cell_costs(profile: str) -> list[CellCost]:
    weights = WEIGHTS[profile]
    forward = WORK_SECONDS / NUM_MICROBATCHES / (1 + BACKWARD_OVER_FORWARD) / sum(weights)
    return [
        CellCost(
            name=str(index),
            forward_seconds=weight * forward,
            backward_seconds=weight * forward * BACKWARD_OVER_FORWARD,
        )
        for index, weight in enumerate(weights)
    ]


def _model(cells: Sequence[CellCost]) -> torch.nn.Sequential:
    return emulated_model(
        [cell.forward_seconds for cell in cells],
        [cell.backward_seconds for cell in cells],
        DEVICE,
    )


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.mean()


if __name__ == "__main__":
    typer.run(main)
