"""What the search gains in simulation: figures that are the same on every machine.

Three tables. `sets`: the search over random cost sets (equal and unequal cells, skips, frozen
beginnings, memory caps, slow links) beside every named schedule with its best cut. `skips`: bytes
that a step of a U-Net and of an encoder-decoder sends between devices, cut and placed without and
with a price on what jumps over stages. `caps`: recomputation that moves, under a cap that
never-recompute does not fit into, beside the best fixed policy, and beside recomputation that
begins when the gradient arrives, as everywhere else.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

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
        "least_bytes": _least_bytes(plan) * plan.num_microbatches,
        "step_seconds": plan.timeline.duration_seconds,
    }


def _least_bytes(plan: Plan) -> int:
    """Return what a microbatch sends at least, however the chain is cut and placed.

    Every device but the first gets something from another one, across some boundary, and the
    smallest that are not the same boundary are taken.
    """
    crossing = sorted(cell.output_bytes + cell.gradient_bytes for cell in plan.cells[:-1])
    return sum(crossing[: plan.num_devices - 1])


def cap_rows() -> list[Row]:
    """Emulated devices under a cap: the best schedules of three kinds, simulated and measured."""
    cases = [replace(V, fraction=fraction) for fraction in FRACTIONS] + [LINE]
    return [row for case in cases for row in _cap_rows(case)]


@dataclass(frozen=True)
class Capped:
    """Stages of one cell each, and the share of what never recomputing keeps that there is."""

    placement: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    num_microbatches: int
    fraction: float

    @property
    def num_devices(self) -> int:
        return 1 + max(device for (device,) in self.placement)

    def cells(self, *, on_arrival: bool) -> tuple[CellCost, ...]:
        """The cells; `on_arrival`, a backward begins with the forward, and no graph is kept."""
        return tuple(
            CellCost(
                name=str(at),
                forward_seconds=w * SCALE,
                backward_seconds=(2 + on_arrival) * w * SCALE,
                input_seconds=(1 + on_arrival) * w * SCALE,
                weight_seconds=w * SCALE,
                activation_bytes=0 if on_arrival else int(1000 * w),
                output_bytes=50,
                gradient_bytes=50,
                deferred_bytes=int(500 * w),
            )
            for at, w in enumerate(self.weights)
        )


_DICE = random.Random(2)
V = Capped(((0,), (1,), (1,), (0,)), tuple(_DICE.uniform(0.5, 1.5) for _ in range(4)), 8, 0.3)
LINE = Capped(((0,), (1,), (2,), (3,)), (1.0,) * 4, 4, 0.3)


def _cap_rows(case: Capped) -> list[Row]:
    plans = _capped(case)
    measured = run_workers(case.num_devices, _steps, [*plans.values()], case.num_microbatches)
    first = plans["on arrival"].timeline.duration_seconds
    return [
        {
            "devices": case.num_devices,
            "stages": len(case.placement),
            "cap": f"{case.fraction:.0%} of never recomputing",
            "recomputation": way,
            "recomputed": len(plan.built_schedule.recomputed)
            or len(case.placement) * case.num_microbatches * (way == "on arrival"),
            "peak_bytes": max(plan.peak_activation_bytes),
            "simulated_seconds": plan.timeline.duration_seconds,
            "simulated_gain": first / plan.timeline.duration_seconds,
            "measured_seconds": seconds,
            "measured_gain": measured[0] / seconds,
        }
        for (way, plan), seconds in zip(plans.items(), measured, strict=True)
    ]


def _capped(case: Capped) -> dict[str, Plan]:
    """Return the fastest synthesised schedules: every microbatch recomputed when its gradient
    arrives, as torch's checkpoint does; any policy, before it arrives; and with moved `R`.
    """
    cells, ones = case.cells(on_arrival=False), [1] * len(case.weights)
    costs, link = stage_costs(cells, ones), LinkCost(latency_seconds=1e-4)
    problem = case.placement, costs, case.num_microbatches, link
    never = synthesise(*problem, effort=EFFORT)
    most = int(case.fraction * max(outcome_of(never, costs, link).peak_bytes))
    caps = [most] * case.num_devices
    fixed, moved = [], []
    for policy in POLICIES:
        with suppress(PlanError):  # does not fit
            fixed.append(synthesise(*problem, memory_bytes=caps, recompute=policy, effort=EFFORT))
            moved.append(with_moved_recomputations(fixed[-1], costs, link, caps, effort=EFFORT))

    def fastest(found: Sequence[Schedule]) -> Plan:
        best = min(found, key=lambda each: outcome_of(each, costs, link).seconds)
        return Plan.from_schedule(best, balance=ones, cells=cells, link=link)

    late = case.cells(on_arrival=True)
    whole = case.placement, stage_costs(late, ones), case.num_microbatches, link
    on_arrival = synthesise(*whole, memory_bytes=caps, effort=EFFORT)
    return {
        "on arrival": Plan.from_schedule(on_arrival, balance=ones, cells=late, link=link),
        "fixed": fastest(fixed),
        "moved": fastest(moved),
    }


def _steps(plans: Sequence[Plan], num_microbatches: int) -> list[float]:
    """Run on every rank: the median step of every plan, all in turn."""
    keep_to_core()
    pipes = []
    for plan in plans:
        names = "forward_seconds", "backward_seconds", "weight_seconds"
        times = ([getattr(cell, name) for cell in plan.cells] for name in names)
        forward, backward, weight = times
        model = emulated_model(forward, backward, DEVICE, weight)
        pipes.append(stagewise.Pipeline(model, plan, loss=lambda output, target: output.mean()))
    batch = torch.zeros(num_microbatches, 1024)
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
