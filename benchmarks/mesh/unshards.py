"""What gathers cost that run beside compute: `python -m benchmarks.mesh.unshards [--quick]`.

Cells are emulated: they sleep for known times, and have weights that `fully_shard` shards over two
ranks, on two pipelines of two devices. The seconds that each device spends in P, U and S, which
start gathers, wait for them and free them, are what unsharding costs; beside it, the same gathers
that start only when they are needed. Reductions (G) stand apart.
"""

import statistics
from collections import defaultdict
from dataclasses import replace

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import stagewise
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.parallel import shard_cells
from stagewise.testing import EmulatedDevice, emulated_model

NUM_CELLS, MICROBATCHES = 8, 8
FORWARD = 0.0025  # seconds of a cell for a microbatch; a backward takes twice as long
CELL_BYTES = 1 << 20
STEPS, QUICK_STEPS, WARM_UP = 15, 5, 9
PLANS = {
    "once": stagewise.Plan(balance=(4, 4), schedule="1f1b", num_microbatches=MICROBATCHES),
    "once, two stages a device": stagewise.Plan(
        balance=(2, 2, 2, 2), schedule="interleaved", num_microbatches=MICROBATCHES
    ),
}
PLANS["again, ahead"] = replace(PLANS["once, two stages a device"], regathered=(0, 1, 2, 3))
PLANS["again, when needed"] = replace(PLANS["again, ahead"], gathers_ahead=False)


class Heavy(nn.Module):
    """An emulated cell with weights."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.weight = cell, nn.Parameter(torch.zeros(CELL_BYTES // 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x + self.weight[:1])


def measure(num_steps: int) -> list[Row]:
    """Run on every rank: each plan's steps, by the device that waits longest."""
    return [_measured(name, plan, num_steps) for name, plan in PLANS.items()]


def _measured(name: str, plan: stagewise.Plan, num_steps: int) -> Row:
    device = EmulatedDevice()
    cells = emulated_model([FORWARD] * NUM_CELLS, [2 * FORWARD] * NUM_CELLS, device)
    pipe = stagewise.Pipeline(
        nn.Sequential(*map(Heavy, cells)),
        plan,
        loss=nn.functional.mse_loss,
        mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard")),
        parallelize=shard_cells,
    )
    batch = torch.zeros(2 * MICROBATCHES, 4)
    found: dict[str, list[float]] = defaultdict(list)
    for step in range(WARM_UP + num_steps):
        device.speed = 1.0 if step >= WARM_UP else float("inf")
        dist.barrier()
        pipe.step(batch, target=batch)
        timeline = pipe.timeline()
        if step >= WARM_UP:
            found["step"].append(timeline.duration_seconds)
            for kinds in ("PUS", "G"):
                spent = [0.0] * timeline.num_devices
                for span in timeline.spans:
                    spent[span.device] += span.seconds * (span.instruction.kind in kinds)
                found[kinds].append(max(spent))
            found["gathers"] = [sum(s.instruction.kind == "U" for s in timeline.spans)]
    usual = {what: statistics.median(values) for what, values in found.items()}
    return {
        "gathered": name,
        "gathers": int(usual["gathers"]),
        "step_ms": 1e3 * usual["step"],
        "unshard_ms": 1e3 * usual["PUS"],
        "unshard_percent": 100 * usual["PUS"] / usual["step"],
        "reduce_ms": 1e3 * usual["G"],
    }


def main(
    quick: bool = typer.Option(False, help="Fewer steps."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure what gathers and reductions cost a step."""
    rows = run_workers(4, measure, QUICK_STEPS if quick else STEPS)
    notes = ("medians; of the device that spends most; goal: overlapped unshards below 3 %",)
    print_rows("gathers beside compute", rows, as_json=json, notes=notes)


if __name__ == "__main__":
    typer.run(main)
