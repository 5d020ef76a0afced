"""`python -m benchmarks.chaos`: at least 200 faults, drawn from a seed."""

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from json import dumps
from pathlib import Path

import typer

from benchmarks.chaos.calls import try_call
from benchmarks.chaos.damage import try_damage
from benchmarks.chaos.faults import FAULTS, Fault
from benchmarks.chaos.forked import CONTEXT, PRELOADED
from benchmarks.chaos.launched import launched
from benchmarks.chaos.summary import as_markdown, failed, rows_in
from benchmarks.chaos.torch_side import Seen, under_torch
from benchmarks.chaos.trial import (
    LAYOUTS,
    Layout,
    Outcome,
    Place,
    Start,
    Weights,
    by_command,
    try_fault,
    undisturbed,
)
from benchmarks.workers import Row, print_rows

_NUM, _NUM_QUICK = 200, 20
_UNDER_TORCH = (
    "torch.distributed.pipelining under torchrun; said: the last line that is not torchrun's"
)
Trial = tuple[str, Callable[[], Outcome | Seen]]  # in words, and how it is tried


def main(
    quick: bool = typer.Option(False, help="Twenty faults; takes a few minutes."),
    faults: int = typer.Option(0, min=0, help=f"How many. [default: {_NUM}]", show_default=False),
    first: int = typer.Option(0, min=0, help="Leave out those with lower numbers."),
    seed: int = typer.Option(0, help="What ranks, steps and microbatches are drawn from."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
    only: str = typer.Option("", help="Only faults whose name contains this."),
    outputs: Path | None = typer.Option(None, help="A file for the outputs of what went wrong."),
    torch: bool = typer.Option(False, "--torch", help="Torch's own pipelining, on 2 ranks."),
    kept: Path | None = typer.Option(
        None, "--continue", help="A file that gets a JSON line after each; those in it are done."
    ),
    is_forked: bool = typer.Option(
        False, "--forked", help="Fork launchers and workers, but for one in ten: a third the time."
    ),
    table: list[Path] = typer.Option([], help="Print files of --continue as Markdown; run none."),
) -> None:
    """Strike small training runs, resume them, and compare with the runs that nothing struck."""
    if table:
        print(as_markdown([row for path in table for row in rows_in(path)]))
        return
    CONTEXT.set_forkserver_preload(PRELOADED)
    number = faults or (_NUM_QUICK if quick else _NUM)
    rows = rows_in(kept) if kept is not None and kept.exists() else []
    done = {(row["number"], row["seed"]) for row in rows}
    trials = torch_trials(seed, only) if torch else our_trials(number, seed, only, is_forked)
    for index, (what, trial) in enumerate(trials):
        if index < first or (index, seed) in done:
            continue
        found = trial()
        row = {**asdict(found), "number": index, "seed": seed}
        text = row.pop("text", "")
        rows.append(row)
        print(row if json else _line(what, row, bool(text)), file=sys.stderr, flush=True)
        if kept is not None:
            with kept.open("a") as file:
                file.write(dumps(row) + "\n")
        if text and outputs is not None:
            with outputs.open("a") as file:
                file.write(f"=== {what}\n{text}\n")
    if torch:
        print_rows("faults under torch", rows, as_json=json, notes=[_UNDER_TORCH])
        return
    lost, unnamed, left = map(len, failed(rows))
    notes = [
        f"{len(rows)} faults: {lost} runs lost, {unnamed} causes not named, {left} left processes "
        "or temporary files behind; seconds: from the fault to the end of the last process, or "
        "without progress where the run went on; difference: of the parameters after the last "
        "step, to those of the run without faults",
    ]
    print_rows("faults", rows, as_json=json, notes=notes)
    sys.exit(bool(lost or unnamed or left))


def our_trials(number: int, seed: int, only: str, is_forked: bool) -> Iterator[Trial]:
    """Yield faults in words, and what tries them."""
    for index, (fault, layout, place) in enumerate(drawn(number, seed, only)):
        is_real = index % 10 == 0 or fault.how == "cut_links"  # forks share the launcher's sockets
        start = launched if is_forked and not is_real else by_command
        what = f"{fault.name}, {layout.name}, rank {place.rank}, step {place.step}"
        if fault.in_loop:
            yield what, partial(try_call, fault, layout, place)
        elif fault.damage:
            yield what, partial(_with_expected, try_damage, fault, layout, start=start)
        else:
            yield what, partial(_with_expected, try_fault, fault, layout, place, start=start)


def torch_trials(seed: int, only: str) -> Iterator[Trial]:
    """Yield one fault of every kind under torch.distributed.pipelining."""
    kinds = sum(only in fault.name for fault in FAULTS)
    for fault, _, place in drawn(kinds, seed, only):
        if not (fault.in_loop or fault.damage or fault.how == "drop"):
            yield f"{fault.name}, under torch", partial(under_torch, fault, place)


@cache
def _expected(layout: str) -> Weights:
    return undisturbed(LAYOUTS[layout])


def _with_expected(
    trial: Callable[..., Outcome], fault: Fault, layout: Layout, *place: Place, start: Start
) -> Outcome:
    return trial(fault, layout, *place, _expected(layout.name), start)


def drawn(number: int, seed: int, only: str = "") -> Iterator[tuple[Fault, Layout, Place]]:
    """Yield `number` faults: each kind in turn, on each layout in turn, at places drawn."""
    draw = random.Random(seed)
    wanted = [fault for fault in FAULTS if only in fault.name]
    layouts = itertools.cycle(LAYOUTS.values())
    for index, fault in enumerate(itertools.islice(itertools.cycle(wanted), number)):
        if wanted and index and index % len(wanted) == 0 and len(wanted) % len(LAYOUTS) == 0:
            next(layouts)  # so that every kind comes to every layout
        layout = next(layouts)
        if fault.in_loop and layout.num_shards > 1:  # the loop has plain pipelines
            layout = LAYOUTS["2 stages"]
        yield fault, layout, Place.drawn(fault, layout, draw)


def _line(what: str, row: Row, is_bad: bool) -> str:
    found = ", ".join(
        f"{key} {row[key]}" for key in ("named", "resumed", "difference") if key in row
    )
    seconds = row["seconds"]
    took = "no end" if seconds is None else f"{float(str(seconds)):.1f} s"
    return f"{what}: {'NOT WELL, ' if is_bad else ''}{took}, {found}"


if __name__ == "__main__":
    typer.run(main)
