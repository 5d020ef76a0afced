"""How many rooms of the house does one training step pass? Counted with sys.setprofile.

A chain of four layers in two stages, with two microbatches: eight instructions. Counted in a step
after the first ones, whose work is done once: the distinct files entered (`rooms`), how often a
call leads from one of them to another (`moves`), and how many calls of ours there are (`calls`);
in one process, and on the busier of two.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
import typer
from torch import nn

import stagewise
from benchmarks.workers import Row, print_rows, run_workers

PACKAGE = str(Path(stagewise.__file__).parent)
WARM_UP = 8  # the first calls are looked at closely
GOALS = "goals: at most 14 rooms, 90 moves and 320 calls in one process"
BEFORE = "before the house was redrawn (f87193d): 26 rooms, 252 moves and 486 calls in one process"


@dataclass
class Count:
    """What one step entered."""

    files: dict[str, int] = field(default_factory=dict)  # and how many calls each got
    moves: int = 0

    @property
    def calls(self) -> int:
        """Of ours."""
        return sum(self.files.values())


def main(
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
    files: bool = typer.Option(False, help="Also print the calls of each file."),
) -> None:
    """Count the files, moves and calls of one training step."""
    count = counted(_pipeline())
    rows = [row("one process", count), run_workers(2, measure)]
    print_rows("rooms that a training step passes", rows, as_json=json, notes=(BEFORE, GOALS))
    if files:
        for name, calls in sorted(count.files.items(), key=lambda item: -item[1]):
            print(f"{calls:4} {name}")


def measure() -> Row:
    """The busier of the ranks, on every rank."""
    found = [row("two processes", counted(_pipeline()))] * dist.get_world_size()
    dist.all_gather_object(found, found[dist.get_rank()])
    return max(found, key=lambda row: row["calls"] or 0)


def row(where: str, count: Count) -> Row:
    """One line of the table."""
    return {"where": where, "rooms": len(count.files), "moves": count.moves, "calls": count.calls}


def counted(pipe: stagewise.Pipeline) -> Count:
    """One step in the steady state."""
    x = torch.ones(4, 8)
    for _ in range(WARM_UP):
        pipe.step(x, target=x)
    with _counting() as count:
        pipe.step(x, target=x)
    return count


@contextmanager
def _counting() -> Iterator[Count]:
    count, last = Count(), ""

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal last
        if event != "call":
            return
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return
        name = name.removeprefix(PACKAGE + "/")
        count.files[name] = count.files.get(name, 0) + 1
        count.moves += name != last
        last = name

    sys.setprofile(note)
    try:
        yield count
    finally:
        sys.setprofile(None)


def _pipeline() -> stagewise.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    plan = stagewise.Plan(balance=(2, 2), schedule="1f1b", num_microbatches=2)
    return stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)


if __name__ == "__main__":
    typer.run(main)
