"""How good are synthesised schedules? Compared with every named one, and with the lower bound.

Random cost sets: unequal stages, links that are not free, contiguous, looped, V and replicated
placements, memory caps, recomputation, split and whole backwards. Everything is simulated, so the
figures, except run times, are the same on any machine.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import typer

from benchmarks.workers import Row, print_rows
from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.planning import lower_bound_seconds, simulate, synthesise
from stagewise.planning.synthesis.synthesise import EFFORT, named_schedules
from stagewise.schedule import with_recompute

PLACEMENTS = ("contiguous", "looped", "v", "replicated")
CAPS = ("none", "depth", "some")
POLICY_CHOICES = ("never", "never", "never", "always", "except_last")
TARGET = "wanted: slower_than_named 0 in every row, median_distance at most 0.03 over all cases"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cost set with everything that `synthesise` takes."""

    kind: str
    cap: str
    placement: tuple[tuple[int, ...], ...]
    costs: tuple[StageCost, ...]
    num_microbatches: int
    link: LinkCost
    memory_bytes: tuple[int, ...] | None
    recompute: str
    split: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case; `named_seconds` is None where no named schedule fits."""

    case: Case
    seconds: float
    named_seconds: float | None
    distance: float
    search_seconds: float


def main(
    quick: bool = typer.Option(False, help="60 cases; takes less than a minute."),
    cases: int = typer.Option(1000, help="How many cost sets."),
    effort: int = typer.Option(EFFORT // 4, help="Operations looked at for each."),
    seed: int = typer.Option(0, help="Of the cost sets."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Compare synthesised schedules with the named ones and with the lower bound."""
    outcomes = [
        measure(random_case(random.Random(f"{seed} {index}")), effort)
        for index in range(60 if quick else cases)
    ]
    groups: list[tuple[str, Callable[[Case], bool]]] = [("all", lambda case: True)]
    groups += [(kind, lambda case, kind=kind: case.kind == kind) for kind in PLACEMENTS]
    groups += [(f"cap: {cap}", lambda case, cap=cap: case.cap == cap) for cap in CAPS]
    groups += [
        (f"recompute: {policy}", lambda case, policy=policy: case.recompute == policy)
        for policy in sorted(set(POLICY_CHOICES))
    ]
    groups += [("split", lambda case: case.split), ("whole", lambda case: not case.split)]
    rows = [summary(name, [o for o in outcomes if belongs(o.case)]) for name, belongs in groups]
    print_rows("synthesised schedules, simulated", rows, as_json=json, notes=(TARGET,))


def random_case(dice: random.Random) -> Case:
    """2 to 8 devices, 4 to 32 microbatches; costs spread by up to 3 either way."""
    num_devices = dice.randint(2, 8)
    kind, cap = dice.choice(PLACEMENTS), dice.choice(CAPS)
    placement = _placement(kind, num_devices, dice)
    spread = dice.choice((1.0, 1.5, 3.0))
    costs = tuple(_stage(dice, spread) for _ in placement)
    slow = dice.choice((0.0, 0.02, 0.1)) * statistics.fmean(c.forward_seconds for c in costs)
    one = [sum(c.input_bytes + c.activation_bytes for c in own) for own in _own(placement, costs)]
    held = num_devices if cap == "depth" else dice.uniform(1, num_devices)
    return Case(
        kind=kind,
        cap=cap,
        placement=placement,
        costs=costs,
        num_microbatches=dice.choice((4, 6, 8, 12, 16, 24, 32)),
        link=LinkCost(latency_seconds=slow, seconds_per_byte=slow / 10, overhead_seconds=slow / 3)
        if slow
        else FREE_LINK,
        memory_bytes=None if cap == "none" else tuple(int(held * bytes_) for bytes_ in one),
        recompute=dice.choice(POLICY_CHOICES),
        split=dice.random() < 0.7,
    )


def _placement(kind: str, num_devices: int, dice: random.Random) -> tuple[tuple[int, ...], ...]:
    row = tuple((device,) for device in range(num_devices))
    if kind == "looped":
        return row + row
    if kind == "v":
        return row + row[::-1]
    if kind == "contiguous":
        return row
    stages: list[tuple[int, ...]] = []
    device = 0
    while device < num_devices:
        replicas = min(dice.choice((1, 1, 2)), num_devices - device)
        stages.append(tuple(range(device, device + replicas)))
        device += replicas
    return tuple(stages)


def _stage(dice: random.Random, spread: float) -> StageCost:
    forward, inputs, weights = (spread ** dice.uniform(-1, 1) for _ in range(3))
    input_bytes, activation_bytes = dice.randint(5, 30), dice.randint(50, 150)
    deferred_bytes = dice.randint(10, input_bytes + activation_bytes)
    return StageCost(
        forward_seconds=forward,
        backward_seconds=(inputs + weights) * dice.choice((1.0, 1.0, 0.95)),
        recompute_seconds=forward,
        input_bytes=input_bytes,
        activation_bytes=activation_bytes,
        output_bytes=dice.randint(5, 30),
        gradient_bytes=dice.randint(5, 30),
        input_seconds=inputs,
        weight_seconds=weights,
        deferred_bytes=deferred_bytes,
        deferred_input_bytes=min(input_bytes, deferred_bytes) * (activation_bytes % 2),
    )


def _own(placement: Sequence[Sequence[int]], costs: Sequence[StageCost]) -> list[list[StageCost]]:
    num_devices = 1 + max(device for devices in placement for device in devices)
    return [
        [cost for cost, devices in zip(costs, placement, strict=True) if device in devices]
        for device in range(num_devices)
    ]


def measure(case: Case, effort: int) -> Outcome:
    """Synthesise, and simulate the result and every named schedule that fits."""
    start = time.perf_counter()
    schedule = synthesise(
        case.placement,
        case.costs,
        case.num_microbatches,
        case.link,
        memory_bytes=case.memory_bytes,
        recompute=case.recompute,
        split=case.split,
        effort=effort,
    )
    search_seconds = time.perf_counter() - start
    seconds = simulate(schedule, case.costs, case.link).duration_seconds
    bound = lower_bound_seconds(
        case.placement,
        case.costs,
        case.num_microbatches,
        case.link,
        memory_bytes=case.memory_bytes,
        recompute=case.recompute,
        split=case.split,
    )
    return Outcome(
        case=case,
        seconds=seconds,
        named_seconds=best_named_seconds(case),
        distance=bound.distance(seconds),
        search_seconds=search_seconds,
    )


def best_named_seconds(case: Case) -> float | None:
    """The fastest named schedule of the same placement that keeps the same caps."""
    best = None
    for named in named_schedules(case.placement, case.num_microbatches):
        if named.splits_backward and not case.split:
            continue
        timeline = simulate(with_recompute(named, case.recompute), case.costs, case.link)
        peaks = timeline.peak_activation_bytes(case.costs)
        caps = case.memory_bytes or peaks
        if all(peak <= cap for peak, cap in zip(peaks, caps, strict=True)):
            seconds = timeline.duration_seconds
            best = seconds if best is None else min(best, seconds)
    return best


def summary(name: str, outcomes: Sequence[Outcome]) -> Row:
    """A row of the table: distances to the bound, gains over the best named schedule."""
    if not outcomes:
        return {"cases": name, "count": 0}
    distances = sorted(o.distance for o in outcomes)  # rounding: -1e-15 is 0
    gains = sorted(o.named_seconds / o.seconds - 1 for o in outcomes if o.named_seconds is not None)
    return {
        "cases": name,
        "count": len(outcomes),
        "min_distance": distances[0],
        "median_distance": statistics.median(distances),
        "p95_distance": distances[int(0.95 * (len(distances) - 1))],
        "max_distance": distances[-1],
        "at_bound": sum(distance < 1e-9 for distance in distances),
        "with_named": len(gains),
        "faster_than_named": sum(gain > 1e-9 for gain in gains),
        "slower_than_named": sum(gain < 0 for gain in gains),
        "median_gain": statistics.median(gains) if gains else None,
        "max_gain": gains[-1] if gains else None,
        "median_search_seconds": statistics.median(o.search_seconds for o in outcomes),
    }


if __name__ == "__main__":
    typer.run(main)
