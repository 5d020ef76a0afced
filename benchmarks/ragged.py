"""Texts of unequal lengths: equal numbers of samples, against microbatches that cost the same.

Lines of Shakespeare's plays, each microbatch padded to its longest line, on two workers; all ways
train the same batches, alternating steps. How much a schedule made for one batch could gain beyond
that is bounded in simulation: no schedule takes less than the busiest device's work, plus the
cheapest microbatch's way to it and from it.
"""

import statistics
import time
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

import stagewise
from benchmarks.workers import Row, print_rows, run_workers
from stagewise.costs import CellCost
from stagewise.models import decoder_lm
from stagewise.planning import order_microbatches, simulate

NUM_STAGES, NUM_MICROBATCHES, LONGEST, WARM_UP = 2, 8, 256, 9
NOTES = (
    "padded_words: of a step, with padding; dearest: of the microbatch with most, over the mean",
    "over_bound: the simulated step over a lower bound for all schedules of these microbatches",
)
# Two equal stages, of which only the relation of forward and backward counts here.
CELLS = (CellCost(name="layer", forward_seconds=1, backward_seconds=2),) * 8
PLAN = stagewise.Plan(balance=(4, 4), num_microbatches=NUM_MICROBATCHES, cells=CELLS)


def main(
    quick: bool = typer.Option(False, help="A small model and few steps."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Compare ways to split texts of unequal lengths."""
    rows = run_workers(NUM_STAGES, measure, quick)
    print_rows("lines of unequal lengths", rows, as_json=json, notes=NOTES)


def padded(lengths: Sequence[float]) -> float:
    """The words that a microbatch computes with."""
    return len(lengths) * max(lengths)


def in_turn(lengths: Sequence[int]) -> list[list[int]]:
    """Equal numbers of samples, as they come."""
    size = len(lengths) // NUM_MICROBATCHES
    return [[*range(at, at + size)] for at in range(0, len(lengths), size)]


def packed(lengths: Sequence[int]) -> list[list[int]]:
    """Microbatches of as many padded words."""
    return stagewise.pack_samples(lengths, NUM_MICROBATCHES, padded)


def in_order(lengths: Sequence[int]) -> list[list[int]]:
    """The same, in the order that the simulator finds fastest."""
    groups = packed(lengths)
    costs = [padded([lengths[sample] for sample in group]) for group in groups]
    return [groups[number] for number in order_microbatches(PLAN, costs)]


def over_bound(costs: Sequence[float]) -> float:
    """The simulated step of PLAN over what any schedule takes at least."""
    shares = [cost / statistics.fmean(costs) for cost in costs]
    seconds = simulate(PLAN.built_schedule, PLAN.stage_costs, shares=shares).duration_seconds
    stage = PLAN.stage_costs[0]
    each = stage.forward_seconds + stage.backward_seconds
    return seconds / (each * (sum(shares) + min(shares)))


WAYS = {
    "equal numbers": in_turn,
    "packed by words": lambda lengths: stagewise.pack_samples(lengths, NUM_MICROBATCHES),
    "packed by padded words": packed,
    "packed, in the best order": in_order,
}


def measure(quick: bool) -> list[Row]:
    """Run on every rank: all ways, each with a pipeline of its own."""
    width, batch_size, num_steps = (64, 32, 3) if quick else (192, 64, 15)
    texts = lines()
    torch.manual_seed(0)
    model = decoder_lm(
        vocabulary=256, num_layers=6, width=width, num_heads=4, context=LONGEST, dropout=0.0
    )
    pipe = stagewise.Pipeline(model, PLAN, loss=loss, weight=lambda target: (target != 0).sum())
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    words: dict[str, list[float]] = {way: [] for way in WAYS}
    dearest: dict[str, list[float]] = {way: [] for way in WAYS}
    bounds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(WARM_UP + num_steps):
        chosen = torch.randint(len(texts), (batch_size,)).tolist()
        own = [texts[at] for at in chosen]
        lengths = [len(text) for text in own]
        for way, split in WAYS.items():
            pipe.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            groups = split(lengths)
            parts = [together([own[sample] for sample in group]) for group in groups]
            inputs = stagewise.Microbatches([part[:, :-1] for part in parts])
            pipe.step(inputs, target=stagewise.Microbatches([part[:, 1:] for part in parts]))
            dist.barrier()
            if number >= WARM_UP:
                times[way].append(time.perf_counter() - start)
                costs = [part.numel() for part in parts]
                words[way].append(sum(costs))
                dearest[way].append(max(costs) / statistics.fmean(costs))
                bounds[way].append(over_bound(costs))
    slowest = statistics.median(times["equal numbers"])
    return [
        {
            "microbatches": way,
            "step_seconds": statistics.median(times[way]),
            "ratio": statistics.median(times[way]) / slowest,
            "padded_words": statistics.fmean(words[way]),
            "dearest": statistics.fmean(dearest[way]),
            "over_bound": statistics.fmean(bounds[way]),
        }
        for way in WAYS
    ]


def lines() -> list[Tensor]:
    """The plays' lines of two bytes or more, cut at LONGEST."""
    path = Path(__file__).parent.parent / "examples" / "shakespeare.py"
    spec = spec_from_file_location("shakespeare", path)
    assert spec is not None and spec.loader is not None
    demo = module_from_spec(spec)
    spec.loader.exec_module(demo)
    text = bytes(demo.read(demo.plays()[:4]).tolist())
    return [
        torch.tensor(list(line[:LONGEST])) for line in text.splitlines() if len(line.strip()) > 1
    ]


def together(texts: Sequence[Tensor]) -> Tensor:
    """Padded with zeros to the longest."""
    return nn.utils.rnn.pad_sequence([*texts], batch_first=True)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean over words that are not padding."""
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=0)


if __name__ == "__main__":
    typer.run(main)
