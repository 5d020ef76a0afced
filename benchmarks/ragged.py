"""Texts of unequal lengths: equal numbers of samples, against microbatches that cost the same.

Lines of Shakespeare's plays, each microbatch padded to its longest line, on two workers; all ways
train the same batches, alternating steps. How much a schedule made for one batch could gain beyond
that is bounded in simulation: the second device has its work to do, and waits before for the
shortest microbatch's way through the first stage. No schedule of this cut takes less.
"""

import statistics
import time
from collections.abc import Callable, Sequence
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
from stagewise.planning import order_microbatches, simulate, synthesise

NUM_STAGES, NUM_MICROBATCHES, LONGEST, WARM_UP = 2, 8, 256, 9
NOTES = (
    "padded_words: of a step, with padding; dearest: of the microbatch with most, over the mean",
    "over_bound: the simulated step over a lower bound for all schedules of these microbatches and "
    "this cut, with split backwards too: what a schedule for one batch gains at most",
)
# Two equal stages, of which only the relation of forward and backward counts here.
CELLS = (CellCost(name="layer", forward_seconds=1, backward_seconds=2),) * 8
PLAN = stagewise.Plan(balance=(4, 4), num_microbatches=NUM_MICROBATCHES, cells=CELLS)
# As `auto` does: made once, for equal microbatches, with split backwards.
SYNTHESISED = stagewise.Plan.from_schedule(
    synthesise(((0,), (1,)), PLAN.stage_costs, NUM_MICROBATCHES, effort=100_000),
    balance=(4, 4),
    cells=CELLS,
)


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


def in_order(lengths: Sequence[int], plan: stagewise.Plan = PLAN) -> list[list[int]]:
    """The same, in the order that the simulator finds fastest."""
    groups = packed(lengths)
    costs = [padded([lengths[sample] for sample in group]) for group in groups]
    return [groups[number] for number in order_microbatches(plan, costs)]


def over_bound(plan: stagewise.Plan, costs: Sequence[float]) -> float:
    """The simulated step of `plan` over what any schedule of its cut takes at least."""
    shares = [cost / statistics.fmean(costs) for cost in costs]
    seconds = simulate(plan.built_schedule, plan.stage_costs, shares=shares).duration_seconds
    stage = plan.stage_costs[0]
    each = stage.forward_seconds + stage.backward_seconds
    return seconds / (each * sum(shares) + stage.forward_seconds * min(shares))


WAYS: dict[str, tuple[stagewise.Plan, Callable[[Sequence[int]], list[list[int]]]]] = {
    "equal numbers": (PLAN, in_turn),
    "packed by words": (
        PLAN,
        lambda lengths: stagewise.pack_samples(lengths, NUM_MICROBATCHES),
    ),
    "packed by padded words": (PLAN, packed),
    "packed, in the best order": (PLAN, in_order),
    "packed, in the best order, synthesised schedule": (
        SYNTHESISED,
        lambda lengths: in_order(lengths, SYNTHESISED),
    ),
}


def measure(quick: bool) -> list[Row]:
    """Run on every rank: all ways, each with a pipeline of its own."""
    width, batch_size, num_steps = (64, 32, 3) if quick else (192, 64, 15)
    texts = lines()
    torch.manual_seed(0)
    model = decoder_lm(
        vocabulary=256, num_layers=6, width=width, num_heads=4, context=LONGEST, dropout=0.0
    )
    pipes = [
        stagewise.Pipeline(model, plan, loss=loss, weight=lambda target: (target != 0).sum())
        for plan in (PLAN, SYNTHESISED)
    ]
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    words: dict[str, list[float]] = {way: [] for way in WAYS}
    dearest: dict[str, list[float]] = {way: [] for way in WAYS}
    bounds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(WARM_UP + num_steps):
        chosen = torch.randint(len(texts), (batch_size,)).tolist()
        own = [texts[at] for at in chosen]
        lengths = [len(text) for text in own]
        for way, (plan, split) in WAYS.items():
            pipe = pipes[plan is SYNTHESISED]
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
                bounds[way].append(over_bound(plan, costs))
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
