"""`python -m benchmarks.chaos`: at least 200 faults, drawn from a seed."""

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import typer

from benchmarks.chaos.calls import try_call
from benchmarks.chaos.damage import try_damage
from benchmarks.chaos.faults import FAULTS, Fault
from benchmarks.chaos.torch_side import under_torch
from benchmarks.chaos.trial import LAYOUTS, Layout, Outcome, Place, try_fault, undisturbed
from benchmarks.workers import Row, print_rows

_NUM, _NUM_QUICK = 200, 20


def main(
    quick: bool = typer.Option(False, help="Twenty faults; takes a few minutes."),
    faults: int = typer.Option(0, min=0, help=f"How many. [default: {_NUM}]", show_default=False),
    seed: int = typer.Option(0, help="What ranks, steps and microbatches are drawn from."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
    only: str = typer.Option("", help="Only faults whose name contains this."),
    outputs: Path | None = typer.Option(None, help="A file for the outputs of what went wrong."),
    torch: bool = typer.Option(False, "--torch", help="Torch's own pipelining, on 2 ranks."),
) -> None:
    """Strike small training runs, resume them, and compare with the runs that nothing struck."""
    if torch:
        print_torch(seed, only, as_json=json)
        return
    rows: list[Row] = []
    expected = {}
    for fault, layout, place in drawn(faults or (_NUM_QUICK if quick else _NUM), seed, only):
        if fault.in_loop:
            outcome = try_call(fault, layout, place)
        else:
            if layout.name not in expected:
                expected[layout.name] = undisturbed(layout)
            if fault.damage:
                outcome = try_damage(fault, layout, expected[layout.name])
            else:
                outcome = try_fault(fault, layout, place, expected[layout.name])
        rows.append(row_of(outcome))
        print(rows[-1] if json else _line(outcome), file=sys.stderr, flush=True)
        if outcome.text and outputs is not None:
            with outputs.open("a") as file:
                file.write(f"=== {outcome.fault}, {outcome.layout}, {outcome.struck}\n")
                file.write(f"{outcome.text}\n")
    lost = sum(not row["resumed"] or bool(row["difference"]) for row in rows)
    unnamed = sum(not row["named"] for row in rows)
    left = sum(int(str(row["left_behind"])) for row in rows)
    notes = [
        f"{len(rows)} faults: {lost} runs lost, {unnamed} causes not named, {left} processes or "
        "temporary files left behind; seconds: from the fault to the end of the last process; "
        "difference: of the parameters after the last step, to those of the run without faults",
    ]
    print_rows("faults", rows, as_json=json, notes=notes)
    sys.exit(bool(lost or unnamed or left))


def drawn(number: int, seed: int, only: str = "") -> Iterator[tuple[Fault, Layout, Place]]:
    """Yield `number` faults: each kind in turn, on each layout in turn, at places drawn."""
    draw = random.Random(seed)
    wanted = [fault for fault in FAULTS if only in fault.name]
    layouts = itertools.cycle(LAYOUTS.values())
    for fault in itertools.islice(itertools.cycle(wanted), number):
        layout = next(layouts)
        yield fault, layout, Place.drawn(fault, layout, draw)


def print_torch(seed: int, only: str, *, as_json: bool) -> None:
    """Print what torch.distributed.pipelining makes of one fault of every kind."""
    rows: list[Row] = []
    kinds = sum(only in fault.name for fault in FAULTS)
    for fault, _, place in drawn(kinds, seed, only):
        if not (fault.in_loop or fault.damage):
            found = under_torch(fault, place)
            rows.append(asdict(found))
            print(rows[-1], file=sys.stderr, flush=True)
    notes = [
        "torch.distributed.pipelining under torchrun; said: the last line that is not torchrun's"
    ]
    print_rows("faults under torch", rows, as_json=as_json, notes=notes)


def row_of(outcome: Outcome) -> Row:
    """Without the output."""
    return {name: value for name, value in asdict(outcome).items() if name != "text"}


def _line(outcome: Outcome) -> str:
    how = "well" if not outcome.text else "NOT WELL"
    return (
        f"{outcome.fault}, {outcome.layout}, {outcome.struck}: {how}, {outcome.seconds:.1f} s, "
        f"named {outcome.named}, resumed {outcome.resumed}, difference {outcome.difference:g}, "
        f"left {outcome.left_behind}"
    )


if __name__ == "__main__":
    typer.run(main)
