"""What does a checkpoint cost the steps around it? Written beside training, and at once.

Two workers train blocks of steps in turn: without a checkpoint, with one that a thread writes
meanwhile, with one that training waits for. Each block with one is compared with the block without
one of the same turn, so that a change of the machine's speed does not count; the order changes from
turn to turn. A block that ends before its checkpoint is written waits for it, as training does
before the next one. `copied_seconds` is what the step itself waits for.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from torch import nn

import stagewise
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.training.background import Saver
from stagewise.training.prepare import Trained
from stagewise.training.state.run_state import NOTHING

NUM_STAGES, NUM_MICROBATCHES, NUM_BLOCKS, WIDTH, BATCH_SIZE = 2, 4, 8, 512, 512
WARM_UP = 10  # steps
NONE, BESIDE, AT_ONCE = "none", "beside training", "at once"
GOAL = "goal: a checkpoint in 100 steps, written beside training, adds less than 2%"


def main(
    quick: bool = typer.Option(False, help="Fewer and shorter blocks; takes about a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure what checkpoints cost."""
    with tempfile.TemporaryDirectory() as run:
        steps, turns = (20, 3) if quick else (100, 6)
        rows = run_workers(NUM_STAGES, measure, Path(run), steps, turns)
    title = f"{NUM_BLOCKS} blocks of width {WIDTH}, batch {BATCH_SIZE}, AdamW"
    print_rows(title, rows, as_json=json, notes=[GOAL])


def measure(run: Path, num_steps: int, num_turns: int) -> list[Row]:
    """Run on every rank: the blocks in turn; one row per way to save."""
    trained, saver = _trained(), Saver(run, None, 1)
    _seconds_of(lambda: _train(trained, WARM_UP))
    ways = [NONE, BESIDE, AT_ONCE]
    seconds: dict[str, list[float]] = defaultdict(list)
    copied: dict[str, list[float]] = defaultdict(list)
    for turn in range(num_turns):
        for way in ways[turn % 3 :] + ways[: turn % 3]:

            def block(way: str = way, turn: int = turn) -> None:
                if way != NONE:
                    start = time.perf_counter()
                    saver.save(trained, step=turn + 1, seed=0, extra=NOTHING)
                    if way == AT_ONCE:
                        saver.finish()
                    copied[way].append(time.perf_counter() - start)
                _train(trained, num_steps)
                saver.finish()

            seconds[way].append(_seconds_of(block))
    assert saver.last is not None
    num_bytes = sum(file.stat().st_size for file in saver.last.path.iterdir())
    return [
        {
            "checkpoint": way,
            "steps_per_checkpoint": num_steps,
            "mib": None if way == NONE else round(num_bytes / 2**20),
            "step_seconds": statistics.median(seconds[way]) / num_steps,
            "ratio": statistics.median(
                with_one / without
                for with_one, without in zip(seconds[way], seconds[NONE], strict=True)
            ),
            "copied_seconds": statistics.median(copied[way]) if way in copied else None,
        }
        for way in ways
    ]


def _trained() -> Trained:
    torch.manual_seed(0)
    cells = [cell for _ in range(NUM_BLOCKS) for cell in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    half = len(cells) // NUM_STAGES
    plan = stagewise.Plan(balance=(half, half), schedule="1f1b", num_microbatches=NUM_MICROBATCHES)
    pipe = stagewise.Pipeline(nn.Sequential(*cells), plan, loss=nn.functional.mse_loss)
    optimizer = torch.optim.AdamW(pipe.parameters())
    return Trained(pipe=pipe, optimizer=optimizer, scheduler=None, objects={})


def _train(trained: Trained, num_steps: int) -> None:
    assert trained.optimizer is not None
    inputs = torch.ones(BATCH_SIZE, WIDTH)
    for _ in range(num_steps):
        trained.pipe.zero_grad()
        trained.pipe.step(inputs, target=inputs)
        trained.optimizer.step()


def _seconds_of(block: Callable[[], None]) -> float:
    """Return how long a block takes until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    block()
    dist.barrier()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
