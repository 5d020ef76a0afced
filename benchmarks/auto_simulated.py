"""What the search gains in simulation: figures that are the same on every machine.

Three tables. `sets`: the search over random cost sets (equal and unequal cells, skips, frozen
beginnings, memory caps, slow links) beside every named schedule with its best cut. `skips`: bytes
that a step of a U-Net and of an encoder-decoder sends between devices, cut and placed without and
with a price on what jumps over stages. `caps`: recomputation that moves, under a cap that
never-recompute does not fit into, beside the best fixed policy.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.distributed as dist
import typer

import stagewise
from benchmarks.auto import WARM_UP
from benchmarks.auto_workloads import DEVICE, pictures, translation
from benchmarks.workers import Row, keep_to_core, print_rows, run_workers
from stagewise.costs import CellCost, FarOutput, LinkCost, stage_costs
from stagewise.errors import PlanError, ScheduleError
from stagewise.planning import Plan, SearchResult, search, synthesise
from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.search.moved_recompute import with_moved_recomputations
from stagewise.planning.search.skip_cuts import wire_bytes
from stagewise.schedule import POLICIES, SCHEDULES, Schedule
from stagewise.testing import emulated_model

KINDS = "equal", "unequal", "skips", "frozen", "capped"
ETHERNET = LinkCost(latency_seconds=20e-6, seconds_per_byte=1e-10)  # 10 GB/s
FRACTIONS = 0.2, 0.25, 0.3, 0.35  # of the memory that never recomputing needs
EFFORT, SCALE = 600_000, 0.012


def main(
    quick: bool = typer.Option(False, help="20 cost sets; less than a minute."),
    sets: int = typer.Option(1000, help="How many cost sets."),
    first: int = typer.Option(0, help="The number of the first one, to go on with others."),
    table: list[str] = typer.Option(["sets", "skips", "caps"], help="Only these tables."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Compare what the search finds with what there was before, in simulation."""
    tables: dict[str, Callable[[], list[Row]]] = {
        "sets": lambda: set_rows(range(first, first + (20 if quick else sets))),
        "skips": skip_rows,
        "caps": cap_rows,
    }
    for name in table:
        print_rows(name, tables[name](), as_json=json, notes=())


@dataclass(frozen=True)
class Case:
    """A cost set, and how many devices and microbatches."""

    kind: str
    cells: tuple[CellCost, ...]
    num_devices: int
    num_microbatches: int
    link: LinkCost
    memory_bytes: float | None = None

    def searched(self, schedules: Sequence[str] | None = None) -> SearchResult:
        return search(
            lambda _: self.cells,
            self.num_devices,
            num_microbatches=[self.num_microbatches],
            memory_bytes=self.memory_bytes,
            link=self.link,
            schedules=schedules,
            synthesis=schedules is None,
        )


def random_case(number: int) -> Case:
    """2 to 4 devices, up to 16 cells whose costs differ by up to 10."""
    dice, kind = random.Random(number), KINDS[number % len(KINDS)]
    num_devices, count = dice.randint(2, 4), dice.randint(6, 16)
    weights = [1.0 if kind == "equal" else dice.uniform(0.2, 2) for _ in range(count)]
    frozen = dice.randint(1, count // 2) if kind == "frozen" else 0
    cells = [
        CellCost(
            name=str(at),
            forward_seconds=w,
            backward_seconds=2 * w if at >= frozen else 0,
            input_seconds=w if at >= frozen else 0,
            weight_seconds=w if at >= frozen else 0,
            parameter_bytes=10,
            trainable_bytes=0 if at < frozen else None,
            activation_bytes=int(1000 * w) if at >= frozen else 0,
            output_bytes=100,
            gradient_bytes=100 if at >= frozen else 0,
            deferred_bytes=int(500 * w) if at >= frozen else 0,
            far_outputs=(FarOutput(count - 1 - 2 * at, 400, 400),)
            if kind == "skips" and at < (count - 1) // 2 - 1
            else (),
        )
        for at, w in enumerate(weights)
    ]
    link = LinkCost(
        latency_seconds=dice.choice((0, 0.01, 0.1)), seconds_per_byte=dice.choice((0, 1e-4, 1e-3))
    )
    case = Case(kind, tuple(cells), num_devices, num_devices * dice.randint(1, 4), link)
    if kind != "capped":
        return case
    free = case.searched(["1f1b"]).chosen.device_bytes
    return replace(case, memory_bytes=dice.uniform(0.6, 1) * max(free))


def set_rows(numbers: Sequence[int]) -> list[Row]:
    """One row per kind of cost set, and one for all."""
    found: dict[str, list[tuple[float, float]]] = {}  # time over the best named one's, distance
    for number in numbers:
        case = random_case(number)
        auto = case.searched()
        named = min((each.chosen.seconds for each in _named(case)), default=float("inf"))
        for group in ("all", case.kind):
            found.setdefault(group, []).append((auto.chosen.seconds / named, auto.distance))
    return [
        {
            "cost_sets": group,
            "count": len(own),
            "slower_than_named": sum(ratio > 1 + 1e-9 for ratio, _ in own),
            "faster_than_named": sum(ratio < 1 - 1e-9 for ratio, _ in own),
            "median_ratio": statistics.median(ratio for ratio, _ in own),
            "least_ratio": min(ratio for ratio, _ in own),
            "median_distance": statistics.median(distance for _, distance in own),
        }
        for group, own in found.items()
    ]


def _named(case: Case) -> Iterator[SearchResult]:
    for name in SCHEDULES:
        try:
            yield case.searched([name])
        except (PlanError, ScheduleError):  # not for these numbers, or nothing fits
            continue


def skip_rows() -> list[Row]:
    """U-Net and encoder-decoder, costs as estimated for an H100, links of 10 GB/s."""
    rows: list[Row] = []
    for name, task in (("U-Net", pictures), ("encoder-decoder", translation)):
        each = task(False)
        for num_devices in (2, 4):
            count = 2 * num_devices
            cells = stagewise.estimate(
                each.model,
                each.inputs,
                target=each.target,
                loss=each.loss,
                num_microbatches=count,
                device="h100",
            )
            blind = tuple(replace(cell, far_outputs=()) for cell in cells)
            for way, seen in (("not priced", blind), ("priced", cells)):
                case = Case(name, seen, num_devices, count, ETHERNET)
                plan = replace(case.searched().plan, cells=cells)
                rows.append(_skip_row(name, way, plan))
    return rows


def _skip_row(name: str, way: str, plan: Plan) -> Row:
    sent = wire_bytes(plan.built_schedule.placement, plan.cells, plan.balance)
    return {
        "model": name,
        "devices": plan.num_devices,
        "skips": way,
        "schedule": f"{plan.schedule}, {plan.num_stages // plan.num_devices} stages per device",
        "wire_bytes": sent * plan.num_microbatches,
        "step_seconds": plan.timeline.duration_seconds,
    }


def cap_rows() -> list[Row]:
    """Two emulated devices, four unequal stages in a V, 8 microbatches: simulated and measured."""
    plans = [plan for fraction in FRACTIONS for plan in _capped(fraction)]
    measured = run_workers(2, _steps, plans)
    return [
        {
            "cap": f"{fraction:.0%} of never recomputing",
            "recomputation": way,
            "recomputed": len(plan.built_schedule.recomputed),
            "peak_bytes": max(plan.peak_activation_bytes),
            "simulated_seconds": plan.timeline.duration_seconds,
            "measured_seconds": seconds,
        }
        for (fraction, way), plan, seconds in zip(
            product(FRACTIONS, ("fixed", "moved")), plans, measured, strict=True
        )
    ]


def _capped(fraction: float) -> tuple[Plan, Plan]:
    """Return the fastest synthesised schedule of any policy, and the fastest with moved `R`."""
    dice = random.Random(2)
    weights = [dice.uniform(0.5, 1.5) for _ in range(4)]
    cells = [
        CellCost(
            name=str(at),
            forward_seconds=w * SCALE,
            backward_seconds=2 * w * SCALE,
            input_seconds=w * SCALE,
            weight_seconds=w * SCALE,
            activation_bytes=int(1000 * w),
            output_bytes=50,
            gradient_bytes=50,
            deferred_bytes=int(500 * w),
        )
        for at, w in enumerate(weights)
    ]
    costs, placement = stage_costs(cells, [1] * 4), ((0,), (1,), (1,), (0,))
    link = LinkCost(latency_seconds=1e-4)
    never = synthesise(placement, costs, 8, link, effort=EFFORT)
    caps = [int(fraction * max(outcome_of(never, costs, link).peak_bytes))] * 2
    fixed, moved = [], []
    for policy in POLICIES:
        try:
            plain = synthesise(
                placement, costs, 8, link, memory_bytes=caps, recompute=policy, effort=EFFORT
            )
        except PlanError:  # does not fit
            continue
        fixed.append(plain)
        moved.append(with_moved_recomputations(plain, costs, link, caps, effort=EFFORT))

    def fastest(found: Sequence[Schedule]) -> Plan:
        best = min(found, key=lambda each: outcome_of(each, costs, link).seconds)
        return Plan.from_schedule(best, balance=(1,) * 4, cells=cells, link=link)

    return fastest(fixed), fastest(moved)


def _steps(plans: Sequence[Plan]) -> list[float]:
    """Run on every rank: the median step of every plan, all in turn."""
    keep_to_core()
    pipes = []
    for plan in plans:
        names = "forward_seconds", "backward_seconds", "weight_seconds"
        times = ([getattr(cell, name) for cell in plan.cells] for name in names)
        forward, backward, weight = times
        model = emulated_model(forward, backward, DEVICE, weight)
        pipes.append(stagewise.Pipeline(model, plan, loss=lambda output, target: output.mean()))
    batch = torch.zeros(8, 1024)
    times = [list[float]() for _ in plans]
    for number in range(-WARM_UP, 5):
        DEVICE.speed = math.inf if number < -1 else 1.0
        for pipe, own in zip(pipes, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            pipe.step(batch, target=batch)
            dist.barrier()
            if number >= 0:
                own.append(time.perf_counter() - start)
    return [*map(statistics.median, times)]


if __name__ == "__main__":
    typer.run(main)
